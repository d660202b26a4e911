"""What is watched while fit trains: means of the losses, steps that are not finite, a loss that does not fall, the bar.
The loop itself is left to training.py, where figures go to tracking.py."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from torch import Tensor
from tqdm.auto import tqdm

from distill.settings import RunError
from distill.tracking import Tracker

_log = logging.getLogger(__name__)


class Guard:
    """Keeps steps whose loss or gradient is not finite from being taken, and tells of them.

    The device decides and the host does not wait: AdamW's fused kernel leaves weights, moments and its count of steps
    alone where `found_inf` is 1 (it is how steps are skipped under loss scaling). The host reads what was decided when
    it reads the losses. All processes refuse the same steps: the figures are means over them, and a mean with one NaN
    in it is one.
    """

    in_a_row = 20
    """So many steps refused one after the other end the training even where they are to be skipped."""

    def __init__(
        self,
        name: str,
        rows: Callable[[int], list[int]],
        tracker: Tracker,
        on_nonfinite: Literal["stop", "skip"],
        skipped: int,
    ) -> None:
        """rows: numbers of a step's rows. skipped: steps refused before this call, by a run that goes on."""
        self.name, self.rows, self.tracker, self.on_nonfinite, self.skipped = name, rows, tracker, on_nonfinite, skipped
        self.pending: list[tuple[int, dict[str, Tensor]]] = []
        self.row = 0

    def refuse(self, step: int, figures: dict[str, Tensor]) -> Tensor:
        """1.0 on the device where the step must not be taken, else 0.0."""
        self.pending.append((step, figures))
        return 1 - torch.stack(list(figures.values())).isfinite().all().float()

    def check(self) -> int:
        """Read what was refused since the last time; the number of steps refused so far.

        Raises:
            RunError: a step was refused and the run is to stop, or too many were in a row.
        """
        if not self.pending:
            return self.skipped
        values = torch.stack([torch.stack(list(figures.values())) for _, figures in self.pending]).tolist()
        pending, self.pending = self.pending, []
        for (step, figures), own in zip(pending, values, strict=True):
            wrong = {name: value for name, value in zip(figures, own, strict=True) if not math.isfinite(value)}
            self.row = self.row + 1 if wrong else 0
            if not wrong:
                continue
            self.skipped += 1
            where = self.tracker.log_skipped(self.name, step + 1, self.rows(step), wrong)
            if self.on_nonfinite == "stop" or self.row == self.in_a_row:
                what, value = next(iter(wrong.items()))
                raise RunError(self._message(step + 1, what.replace("_", " "), value, where))
        return self.skipped

    def _message(self, step: int, what: str, value: float, where: Path) -> str:
        remedy = "Lower the learning rate, train in float32 (runtime.precision=fp32), correct those rows"
        if self.on_nonfinite == "stop":
            remedy += ", or pass over such steps with runtime.on_nonfinite=skip"
        else:
            remedy = f"It is the {self.in_a_row}th in a row. {remedy}"
        return (
            f"{self.name}: the {what} is {value} at step {step}; the step was not taken, and the numbers of its rows "
            f"are in {where}. {remedy}; the same command goes on from the last checkpoint."
        )


class Fall:
    """The mean loss over the first and the last quarter of the steps; a training whose loss does not fall is told of.

    The loss is the one with the configured weights: those that `balance` adapts would make the two incomparable.
    """

    def __init__(self, steps: int, window: int, known: Mapping[str, list[float]]) -> None:
        self.steps, self.long_enough = steps, steps >= 4 * window
        self.sums = {part: list(known.get(part, (0.0, 0))) for part in ("first", "last")}

    def add(self, done: int, steps: int, loss: float) -> dict[str, list[float]]:
        """Take the mean over the last `steps` steps; what a checkpoint keeps."""
        for part, inside in (("first", done <= self.steps / 4), ("last", done > self.steps * 3 / 4)):
            if inside and steps:
                total, count = self.sums[part]
                self.sums[part] = [total + loss * steps, count + steps]
        return self.sums

    def means(self) -> tuple[float | None, float | None]:
        first, last = (total / count if count else None for total, count in self.sums.values())
        return first, last

    def report(self, name: str) -> None:
        first, last = self.means()
        if self.long_enough and first is not None and last is not None and last >= first > 0:
            _log.warning(
                "%s: the loss did not fall: %.4g over the first quarter of the steps, %.4g over the last. Look at its "
                "parts in metrics.jsonl; another learning rate, longer training or other losses may help.",
                name,
                first,
                last,
            )


class Meter:
    """Means since the last reading, kept on the device: reading them is the only wait for it."""

    def __init__(self, tokens: int) -> None:
        self.step: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.began, self.tokens, self.steps_read = time.monotonic(), tokens, 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is no training does not count against its speed."""
        paused = time.monotonic()
        yield
        self.began += time.monotonic() - paused

    def add(self, total: Tensor, parts: Mapping[str, Tensor]) -> None:
        for name, value in {"loss": total, **parts}.items():
            self.step[name] = self.step[name] + value if name in self.step else value

    def step_figures(self, norm: Tensor | None) -> dict[str, Tensor]:
        """The step's losses, means over processes, and the norm of its gradient; on the device."""
        # The weights of a step's examples sum to 1 over its micro-batches and average to 1 over processes.
        own, self.step = self.step, {}
        if norm is not None:
            own["gradient_norm"] = norm.detach().to(own["loss"])
        means = reduce(torch.stack(list(own.values())), reduction="mean")
        return dict(zip(own, means.unbind(), strict=True))

    def close_step(self, figures: Mapping[str, Tensor], refused: Tensor) -> None:
        """A step that was not taken is left out of the means."""
        for name, value in {"steps": torch.ones_like(refused), **figures}.items():
            kept = torch.where(refused > 0, 0.0, value)
            self.sums[name] = self.sums[name] + kept if name in self.sums else kept

    def read(self, rate: float, tokens: int) -> dict[str, float]:
        sums = dict(zip(self.sums, torch.stack(list(self.sums.values())).tolist(), strict=True))
        self.steps_read = round(sums.pop("steps"))
        figures = {name: value / self.steps_read if self.steps_read else math.nan for name, value in sums.items()}
        now = time.monotonic()
        figures |= {"gradient_norm": figures.pop("gradient_norm", math.nan), "learning_rate": rate}
        figures["tokens_per_second"] = (tokens - self.tokens) / (now - self.began)
        self.sums, self.began, self.tokens = {}, now, tokens
        return figures


class Progress:
    """A bar with the time left, on the main process; sparse lines where the output is a file."""

    def __init__(self, accelerator: Accelerator, name: str, first: int, last: int) -> None:
        self.bar = tqdm(
            total=last,
            initial=first,
            desc=name,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5,
            disable=not accelerator.is_local_main_process,
        )
        self.notes: dict[str, str] = {}

    def advance(self) -> None:
        self.bar.update()

    def note(self, name: str, value: float) -> None:
        self.notes[name] = f"{value:.4g}"
        self.bar.set_postfix(self.notes, refresh=False)

    def close(self) -> None:
        self.bar.close()
