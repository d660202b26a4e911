"""Claims about what fit() watches (distill/monitoring.py): a step that is not finite is not taken and its rows are
written, a run of them ends the training; a loss that does not fall is told of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from distill.checkpoint import Checkpoints, cpu_state
from distill.data import Batches
from distill.interruption import Interrupted
from distill.losses import (
    LabelLoss,
)
from distill.settings import RunError
from distill.students import Student
from distill.training import FitResult, TrainingOptions, fit
from tests.builders import ListTracker, new_session
from tests.toy_training import OPTIONS, PREDICTION, Setting, require_equal


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    torch.manual_seed(0)
    return Setting(tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run_with_advice(setting: Setting) -> None:
    student = setting.student()
    with torch.no_grad():
        student.model.base_model.embeddings.word_embeddings.weight.fill_(math.nan)
    with pytest.raises(
        RunError, match=r"task\.test: the loss is nan at step 1; the step was not taken.* Lower the learn"
    ):
        setting.fit(student)


@dataclass
class SpoiltBatches:
    """Batches whose loss is weighted by NaN, or by infinity, in some steps."""

    batches: Batches
    spoilt: dict[int, float]
    steps_per_epoch: int | None = None

    def rows(self, step: int) -> list[int]:
        return self.batches.rows(step)

    def steps(self, first: int, last: int) -> Iterator[list[dict[str, Tensor]]]:
        for step, parts in enumerate(self.batches.steps(first, last), start=first):
            if step in self.spoilt and last - first > 1:  # not the first batch that fit looks at
                parts[-1]["example_weight"][0] = self.spoilt[step]
            yield parts


def fit_spoilt(
    setting: Setting,
    student: Student,
    spoilt: dict[int, float],
    on_nonfinite: Literal["stop", "skip"],
    options: TrainingOptions = OPTIONS,
    **more: Any,
) -> tuple[FitResult, ListTracker]:
    tracker = ListTracker()
    session = new_session(tracker, on_nonfinite=on_nonfinite, **more)
    result = fit(
        student,
        setting.teacher,
        setting.objective(PREDICTION),
        SpoiltBatches(setting.batches(options), spoilt),
        options,
        session,
        name="task.test",
        checkpoints=Checkpoints(setting.folder / "spoilt", session.accelerator),
    )
    return result, tracker


class Steps:
    """What every step of AdamW is given and leaves, by a hook on all optimizers."""

    def __init__(self) -> None:
        self.before: list[list[Tensor]] = []
        self.after: list[list[Tensor]] = []

    def __enter__(self) -> Steps:
        def parameters(optimizer: Any) -> list[Tensor]:
            found = [p for group in optimizer.param_groups for p in group["params"]]
            moments = [optimizer.state[p][name] for p in found for name in sorted(optimizer.state[p])]
            return [tensor.detach().clone() for tensor in [*found, *moments]]

        self.handles = [
            register_optimizer_step_pre_hook(lambda o, a, k: self.before.append(parameters(o))),
            register_optimizer_step_post_hook(lambda o, a, k: self.after.append(parameters(o))),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_that_is_not_finite_is_not_taken_and_the_next_ones_are(
    value: float, accumulation: int, setting: Setting
) -> None:
    """Neither weights, nor AdamW's moments, nor its count of steps."""
    options = replace(OPTIONS, gradient_accumulation_steps=accumulation)
    student = setting.student()
    with Steps() as steps:
        result, tracker = fit_spoilt(setting, student, {4: value, 7: value}, "skip", options)
    for step, (before, after) in enumerate(zip(steps.before, steps.after, strict=True)):
        # The moments are made in the first step.
        same = len(before) == len(after) and all(map(torch.equal, before, after))
        assert same == (step in (4, 7)), step
    assert all(tensor.isfinite().all() for tensor in cpu_state(student).values())
    assert result.skipped_steps == 2
    assert [row["step"] for row in tracker.skipped] == [5, 8]
    batches = setting.batches(options)
    seen = [sorted(int(row) for part in batches.plan(step, step + 1) for row, _ in part) for step in (4, 7)]
    assert [row["rows"] for row in tracker.skipped] == seen
    assert "loss" in tracker.skipped[0]["wrong"]
    assert all(math.isfinite(row["train/loss"]) for row in tracker.rows if row["step"] not in (5, 8))


def test_a_skipped_step_leaves_the_weights_of_a_training_without_it(setting: Setting) -> None:
    """Under a constant rate the steps after it are those of a training that never had it."""

    class Without(SpoiltBatches):
        def steps(self, first: int, last: int) -> Iterator[list[dict[str, Tensor]]]:
            for step, parts in enumerate(self.batches.steps(first, last + 1), start=first):
                if step != 4:
                    yield parts

    options = replace(OPTIONS, schedule="constant", warmup_fraction=0.0, max_steps=12)
    spoilt, never = setting.student(dropout=0), setting.student(dropout=0)
    fit_spoilt(setting, spoilt, {4: math.nan}, "skip", options)
    session = new_session()
    fit(
        never,
        setting.teacher,
        setting.objective(PREDICTION),
        Without(setting.batches(options), {}),
        replace(options, max_steps=11),
        session,
        name="task.test",
        checkpoints=Checkpoints(setting.folder / "never", session.accelerator),
    )
    require_equal(cpu_state(spoilt), cpu_state(never))


def test_a_run_stops_at_a_step_that_is_not_finite_and_goes_on_by_skipping(setting: Setting) -> None:
    whole = setting.student()
    fit_spoilt(replace_folder(setting, "whole"), whole, {7: math.nan}, "skip")
    with pytest.raises(
        RunError, match=r"the loss is nan at step 8; .*skipped_steps\.jsonl.*runtime\.on_nonfinite=skip"
    ):
        fit_spoilt(setting, setting.student(), {7: math.nan}, "stop")
    student = setting.student()
    result, tracker = fit_spoilt(setting, student, {7: math.nan}, "skip")
    assert tracker.rows[0]["step"] == 6, "it goes on from the checkpoint after step 5"
    assert result.skipped_steps == 1
    require_equal(cpu_state(student), cpu_state(whole))


def replace_folder(setting: Setting, name: str) -> Setting:
    return Setting(setting.folder / name)


def test_what_was_skipped_before_a_stop_is_still_counted(setting: Setting) -> None:
    with pytest.raises(Interrupted):
        fit_spoilt(setting, setting.student(), {2: math.nan, 9: math.nan}, "skip", stop_after=6)
    result, tracker = fit_spoilt(setting, setting.student(), {2: math.nan, 9: math.nan}, "skip")
    assert result.skipped_steps == 2
    assert [row["step"] for row in tracker.skipped] == [10]


def test_a_stop_between_two_log_lines_is_no_hiding_place(setting: Setting) -> None:
    """What was refused is read before a checkpoint is written, or a run that goes on from it would not know."""
    options = replace(OPTIONS, log_every_steps=100, save_every_steps=5)
    with pytest.raises(RunError, match="at step 3;"):
        fit_spoilt(setting, setting.student(), {2: math.nan}, "stop", options)
    assert not list((setting.folder / "spoilt").glob("checkpoint-*"))


def test_a_training_of_which_nothing_is_finite_ends_even_where_steps_are_skipped(setting: Setting) -> None:
    options = replace(OPTIONS, max_steps=60, log_every_steps=10)
    with pytest.raises(RunError, match=r"the loss is nan at step 25; .* It is the 20th in a row"):
        fit_spoilt(setting, setting.student(), dict.fromkeys(range(5, 60), math.nan), "skip", options)


def test_a_loss_that_does_not_fall_is_told_of(setting: Setting, caplog: pytest.LogCaptureFixture) -> None:
    class Growing(SpoiltBatches):
        def steps(self, first: int, last: int) -> Iterator[list[dict[str, Tensor]]]:
            for step, parts in enumerate(self.batches.steps(first, last), start=first):
                yield [{**part, "example_weight": part["example_weight"] * (1 + step)} for part in parts]

    student, tracker = setting.student(), ListTracker()
    session = new_session(tracker)
    options = replace(OPTIONS, learning_rate=1e-9)
    result = fit(
        student,
        None,
        setting.objective({"labels": LabelLoss()}),
        Growing(setting.batches(options), {}),
        options,
        session,
        name="task.test",
        checkpoints=Checkpoints(setting.folder / "growing", session.accelerator),
    )
    curve = tracker.curve("train/loss")
    assert (result.first_loss, result.last_loss) == pytest.approx((sum(curve[:3]) / 3, sum(curve[-3:]) / 3))
    assert "task.test: the loss did not fall: " in caplog.text


def test_a_loss_that_falls_is_not(setting: Setting, caplog: pytest.LogCaptureFixture) -> None:
    options = TrainingOptions(max_steps=48, batch_size=16, learning_rate=5e-3, log_every_steps=2)
    tracker = ListTracker()
    result = setting.fit(setting.student(), options, terms={"labels": LabelLoss()}, tracker=tracker)
    assert "did not fall" not in caplog.text
    curve = tracker.curve("train/loss")
    assert result.first_loss == pytest.approx(sum(curve[:6]) / 6)
    assert result.last_loss == pytest.approx(sum(curve[-6:]) / 6)
