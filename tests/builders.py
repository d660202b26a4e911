"""What several test files build: rows on disk, encoded sets, sessions that log into a list, runs of the pipeline.
Models and activations for the tests of losses are conftest.py's."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import pytest
from accelerate import Accelerator
from datasets import Dataset

from distill.training import Session
from pipelines import cli
from pipelines import task as task_stage

ROOT = Path(__file__).parent.parent


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """JSON lines; returns the file's name."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def encoded_rows(lengths: Iterable[int]) -> Dataset:
    """An encoded set whose row r has the given length and begins with the piece r."""
    lengths = list(lengths)
    return Dataset.from_dict(
        {
            "input_ids": [[row] + [1] * (length - 1) for row, length in enumerate(lengths)],
            "labels": [row % 2 for row in range(len(lengths))],
            "length": lengths,
        }
    )


def uneven_lengths(count: int, longest: int = 40, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, longest, size=count).tolist()


class ListTracker:
    """Keeps what is logged; stands in for tracking.Tracker."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[dict[str, Any]] = []

    def begin_stage(self, stage: str, done: int) -> None:
        pass

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self.rows.append({"stage": stage, "step": step, **values})

    def log_skipped(self, stage: str, step: int, rows: Sequence[int], wrong: Mapping[str, float]) -> Path:
        self.skipped.append({"stage": stage, "step": step, "rows": list(rows), "wrong": sorted(wrong)})
        return Path("skipped_steps.jsonl")

    def curve(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if name in row]


class StopAfter:
    """Stands in for interruption.Interruption: a signal arrives during the given step; never where None."""

    def __init__(self, step: int | None = None, signum: int = 15) -> None:
        self.left, self.signum = step, signum

    def requested(self) -> int:
        if self.left is None:
            return 0
        self.left -= 1
        return self.signum if self.left <= 0 else 0

    def raise_if_requested(self) -> None:
        pass


def new_session(
    tracker: ListTracker | None = None,
    stop_after: int | None = None,
    on_nonfinite: Literal["stop", "skip"] = "stop",
    sharded: bool = False,
) -> Session:
    return Session(Accelerator(), tracker or ListTracker(), StopAfter(stop_after), on_nonfinite, sharded)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str


def run_cli(*arguments: str | Path) -> Outcome:
    """What scripts/distill.py does with these arguments, in this process."""
    return _outcome(cli.run_main, ["scripts/distill.py", *map(str, arguments)])


def run_tinybert(*arguments: str | Path) -> Outcome:
    """What the command `tinybert` does with these arguments, in this process."""
    return _outcome(cli.main, ["tinybert", *map(str, arguments)])


def _outcome(main: Callable[[], None], command: list[str]) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", command),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return Outcome(status, out.getvalue(), err.getvalue())


def succeed(*arguments: str | Path) -> Outcome:
    outcome = run_cli(*arguments)
    assert outcome.status == 0, outcome.err[-3000:]
    return outcome


def rows_of_phases(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Fills while runs train: how many rows each phase of the task has."""
    rows: dict[str, int] = {}
    fit = task_stage.fit

    def watched(*arguments: Any, name: str, **options: Any) -> Any:
        rows[name] = len(arguments[3].lengths)
        return fit(*arguments, name=name, **options)

    monkeypatch.setattr(task_stage, "fit", watched)
    return rows


TINY = str(ROOT / "configs" / "tiny.yaml")
FEW_STEPS = (
    # One process can hold one precision only, and auto would measure one.
    "runtime.precision=fp32",
    "teacher.training={max_steps: 8, batch_size: 16, learning_rate: 3e-3, log_every_steps: 1}",
    "general.training={max_steps: 3, batch_size: 16, log_every_steps: 1}",
    "augment.copies=1",
    "task.intermediate={max_steps: 6, batch_size: 16, learning_rate: 1e-3, log_every_steps: 1}",
    "task.logits={max_steps: 6, batch_size: 16, learning_rate: 1e-3, log_every_steps: 1}",
)
"""Overrides that make a run of configs/tiny.yaml a matter of seconds."""


@functools.cache
def finished_run() -> Path:
    """The folder of one run of the toy, tracked by W&B and TensorBoard too. Look at it, or work on a copy."""
    keep = tempfile.TemporaryDirectory(prefix="tinybert-tests-")
    _KEPT.append(keep)  # removed when the process ends
    folder = Path(keep.name) / "run"
    with mock.patch.dict(os.environ, {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}):
        succeed(TINY, *FEW_STEPS, "tracking=[wandb, tensorboard]", "--output", folder)
    return folder


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file, for comparing before and after."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
