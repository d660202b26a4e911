"""Claims about distill/training.py: fit() learns, resumes to the bit, keeps the best.
Damaged checkpoints are test_checkpoint.py's, stages and run folders test_pipeline.py's, two processes
test_distributed.py's."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from distill.checkpoint import cpu_state
from distill.interruption import Interrupted
from distill.losses import (
    EmbeddingLoss,
    HiddenLoss,
    LabelLoss,
    LogitsLoss,
    LossTerm,
    RelationLoss,
)
from distill.students import Student
from distill.training import TrainingOptions, Validation, total_steps
from tests.builders import ListTracker
from tests.toy_training import LAYERS, OPTIONS, Setting, dtypes_of_a_second_training, require_equal


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    torch.manual_seed(0)
    return Setting(tmp_path)


# ---- learning


def falls(curve: list[float], to: float) -> bool:
    quarter = len(curve) // 4
    return sum(curve[-quarter:]) < to * sum(curve[:quarter])


def test_fit_lowers_every_loss_on_layers(setting: Setting) -> None:
    student, tracker = setting.student(), ListTracker()
    options = TrainingOptions(epochs=3, batch_size=16, learning_rate=5e-3, log_every_steps=1)
    result = setting.fit(student, options, terms=LAYERS, tracker=tracker)
    assert result.steps == len(tracker.rows) == 36
    for name in ("loss", *LAYERS):
        assert falls(tracker.curve(f"train/{name}"), to=0.8), name
    assert not student.training


def test_fit_learns_labels_and_then_another_one_its_logits(setting: Setting) -> None:
    options = TrainingOptions(epochs=5, batch_size=16, learning_rate=5e-3, log_every_steps=1)
    first, tracker = setting.student(dropout=0), ListTracker()
    setting.fit(first, options, terms={"labels": LabelLoss()}, tracker=tracker)
    curve = tracker.curve("train/labels")
    assert sum(curve[:5]) / 5 == pytest.approx(math.log(2), rel=0.1), "two classes, nothing known yet"
    assert falls(curve, to=0.5)

    taught, tracker = Setting(setting.folder), ListTracker()
    taught.teacher = first.model.requires_grad_(False)
    second = taught.student()
    taught.fit(second, options, terms={"logits": LogitsLoss()}, tracker=tracker, folder="second")
    assert falls(tracker.curve("train/logits"), to=0.5)


def test_tokens_are_those_that_are_not_padding(setting: Setting) -> None:
    result = setting.fit(setting.student(), TrainingOptions(epochs=2, batch_size=20))
    assert result.tokens == 2 * sum(setting.features["length"])
    assert result.steps == 2 * 10


def test_the_teacher_is_left_alone(setting: Setting) -> None:
    before = cpu_state(setting.teacher)
    setting.fit(setting.student())
    require_equal(cpu_state(setting.teacher), before)
    assert not setting.teacher.training


def test_what_no_loss_reaches_stays_as_it_was(setting: Setting) -> None:
    """The head in the intermediate phase; weight decay must not touch it either."""
    student = setting.student()
    before = cpu_state(student)
    setting.fit(student, terms={"hidden": HiddenLoss()})
    after = cpu_state(student)
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert {"model.classifier.weight", "model.bert.pooler.dense.weight", "projections.layer_0.weight"} <= still
    assert "projections.layer_2.weight" not in still
    assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize("accumulation", [3, 16])
def test_accumulation_changes_memory_not_the_student(accumulation: int, setting: Setting) -> None:
    whole, parts = setting.student(dropout=0), setting.student(dropout=0)
    # 192 rows in steps of 20: the last step of an epoch has 12 rows, fewer than 16 parts.
    options = TrainingOptions(epochs=1, batch_size=20, learning_rate=1e-3)
    setting.fit(whole, options, folder="whole")
    options = TrainingOptions(epochs=1, batch_size=20, learning_rate=1e-3, gradient_accumulation_steps=accumulation)
    setting.fit(parts, options, folder="parts")
    torch.testing.assert_close(cpu_state(parts), cpu_state(whole), rtol=1e-3, atol=2e-5)


def test_gradients_are_clipped_to_their_norm(setting: Setting) -> None:
    tracker = ListTracker()
    loose = TrainingOptions(max_steps=2, batch_size=16, log_every_steps=1, max_gradient_norm=1e9)
    setting.fit(setting.student(dropout=0), loose, folder="loose", tracker=tracker)
    norm = tracker.curve("train/gradient_norm")[0]

    class Recorder:
        norms: list[float] = []  # noqa: RUF012

    def remember(optimizer: Any, args: Any, kwargs: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        Recorder.norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))

    handle = register_optimizer_step_pre_hook(remember)
    try:
        tight = TrainingOptions(max_steps=2, batch_size=16, log_every_steps=1, max_gradient_norm=norm / 10)
        setting.fit(setting.student(dropout=0), tight, folder="tight")
    finally:
        handle.remove()
    assert Recorder.norms[0] == pytest.approx(norm / 10, rel=1e-3)


# ---- resuming


@pytest.mark.parametrize("killed_after", [1, 4, 7, 12])
def test_a_stopped_and_resumed_training_gives_the_same_weights_to_the_bit(killed_after: int, setting: Setting) -> None:
    unbroken = setting.student()
    torch.manual_seed(0)
    expected = setting.fit(unbroken, validation=setting.held_out(unbroken))

    first = setting.student()
    torch.manual_seed(0)
    with pytest.raises(Interrupted) as stop:
        setting.fit(first, folder="broken", stop_after=killed_after, validation=setting.held_out(first))
    assert stop.value.status == 143
    torch.manual_seed(999)  # a new process has other random numbers
    second = setting.student()
    found = setting.fit(second, folder="broken", validation=setting.held_out(second))

    require_equal(cpu_state(second), cpu_state(unbroken))
    assert (found.steps, found.tokens, found.best_step, found.best) == (
        expected.steps,
        expected.tokens,
        expected.best_step,
        expected.best,
    )


def test_a_killed_training_goes_on_from_its_last_checkpoint_to_the_bit(setting: Setting) -> None:
    class Killed(Exception):
        pass

    class DiesAt(ListTracker):
        def log(self, stage: str, step: int, values: Any) -> None:
            if step == 8:
                raise Killed

    unbroken = setting.student()
    torch.manual_seed(0)
    setting.fit(unbroken)
    torch.manual_seed(0)
    with pytest.raises(Killed):
        setting.fit(setting.student(), folder="broken", tracker=DiesAt())
    torch.manual_seed(999)
    second, tracker = setting.student(), ListTracker()
    setting.fit(second, folder="broken", tracker=tracker)
    assert [row["step"] for row in tracker.rows] == [6, 7, 8, 9, 10, 11, 12], "the last checkpoint was after step 5"
    require_equal(cpu_state(second), cpu_state(unbroken))


@pytest.mark.parametrize("drawn_before", [0, 1000])
def test_dropout_of_a_training_hangs_on_the_seed_not_on_what_ran_before(drawn_before: int, setting: Setting) -> None:
    """Else a run whose earlier stages were skipped would differ from one that ran them."""
    students = [setting.student(), setting.student()]
    for number, student in enumerate(students):
        torch.manual_seed(42)
        torch.rand(number * drawn_before)
        setting.fit(student, folder=f"run-{number}")
    require_equal(cpu_state(students[0]), cpu_state(students[1]))


# ---- choosing


def scripted(student: Student, figures: list[float], higher: bool, seen: list[dict[str, Tensor]]) -> Validation:
    values = iter(figures)

    def run() -> dict[str, float]:
        assert not student.training
        seen.append(cpu_state(student))
        return {"figure": next(values)}

    return Validation(run, "figure", higher_is_better=higher)


@pytest.mark.parametrize(
    ("figures", "higher", "best"),
    [([0.5, 0.9, 0.7], True, 1), ([0.5, 0.9, 0.7], False, 0), ([0.9, 0.9, 0.1], True, 1), ([0.1, 0.2, 0.3], True, 2)],
)
def test_the_best_weights_are_kept_and_the_later_of_two_equal_ones(
    figures: list[float], higher: bool, best: int, setting: Setting
) -> None:
    student, seen = setting.student(), list[dict[str, Tensor]]()
    result = setting.fit(student, validation=scripted(student, figures, higher, seen))
    assert len(seen) == 3
    require_equal(cpu_state(student), seen[best])
    assert result.best == {"figure": figures[best]}
    assert result.best_step == 4 * (best + 1)


def test_the_best_weights_survive_a_stop_after_them(setting: Setting) -> None:
    student, seen = setting.student(), list[dict[str, Tensor]]()
    with pytest.raises(Interrupted):
        setting.fit(student, stop_after=6, validation=scripted(student, [0.9], True, seen))
    student = setting.student()
    result = setting.fit(student, validation=scripted(student, [0.5, 0.4], True, []))
    assert result.best_step == 4
    require_equal(cpu_state(student), seen[0])


# ---- steps, rates


def test_steps_of_a_training() -> None:
    assert total_steps(TrainingOptions(epochs=2.5), 10) == 25
    assert total_steps(TrainingOptions(epochs=0.01), 10) == 1
    assert total_steps(TrainingOptions(epochs=9, max_steps=7), 10) == 7
    assert total_steps(TrainingOptions(max_steps=7), None) == 7
    with pytest.raises(ValueError, match="set max_steps"):
        total_steps(TrainingOptions(), None)


def test_the_logged_rate_is_the_one_that_was_used(setting: Setting) -> None:
    tracker = ListTracker()
    options = TrainingOptions(max_steps=4, batch_size=16, learning_rate=1.0e-3, warmup_fraction=0, log_every_steps=1)
    setting.fit(setting.student(), options, tracker=tracker)
    assert tracker.curve("train/learning_rate") == pytest.approx([1.0e-3, 0.75e-3, 0.5e-3, 0.25e-3])


# ---- gradient shares


def test_shares_of_the_gradient_are_logged_when_measured_and_sum_to_one(setting: Setting) -> None:
    tracker = ListTracker()
    options = replace(OPTIONS, measure_gradients_every_steps=5)
    setting.fit(setting.student(), options, terms=LAYERS, tracker=tracker)
    rows = [row for row in tracker.rows if "gradient_share/hidden" in row]
    assert [row["step"] for row in rows] == [1, 6, 11]
    for row in rows:
        assert sum(row[f"gradient_share/{name}"] for name in LAYERS) == pytest.approx(1)


def test_measuring_gradients_changes_no_bit_of_the_training(setting: Setting) -> None:
    students = []
    for every in (1, 1000):
        student = setting.student()
        setting.fit(student, replace(OPTIONS, measure_gradients_every_steps=every), folder=f"every{every}")
        students.append(student)
    require_equal(*map(cpu_state, students))


def test_balance_keeps_the_shares_at_their_configured_ratio(setting: Setting) -> None:
    """At the first measurement exactly; it is that batch's own."""
    terms: dict[str, LossTerm] = {"embedding": EmbeddingLoss(weight=1), "hidden": HiddenLoss(weight=3)}
    tracker = ListTracker()
    options = replace(OPTIONS, balance="gradient", measure_gradients_every_steps=100)
    setting.fit(setting.student(), options, terms=terms, tracker=tracker)
    first = next(row for row in tracker.rows if "gradient_share/hidden" in row)
    assert first["gradient_share/embedding"] == pytest.approx(0.25)
    assert first["gradient_share/hidden"] == pytest.approx(0.75)


def test_a_balanced_training_resumes_to_the_bit(setting: Setting) -> None:
    options = replace(OPTIONS, balance="gradient", measure_gradients_every_steps=4)
    unbroken = setting.student()
    setting.fit(unbroken, options)
    with pytest.raises(Interrupted):
        setting.fit(setting.student(), options, folder="broken", stop_after=6)
    resumed = setting.student()
    setting.fit(resumed, options, folder="broken")
    require_equal(cpu_state(unbroken), cpu_state(resumed))


def test_values_that_only_relations_read_are_trained(setting: Setting) -> None:
    """The value projection of the last mapped layer gets its gradient from the V-V relation alone."""
    student = setting.student()
    before = student.model.bert.encoder.layer[1].attention.self.value.weight.clone()
    setting.fit(student, terms={"relations": RelationLoss(relations=("value",))})
    assert not torch.equal(student.model.bert.encoder.layer[1].attention.self.value.weight, before)


def test_every_training_of_a_student_is_in_the_precision_of_the_run(setting: Setting) -> None:
    assert dtypes_of_a_second_training(setting) == ["torch.float32"] + ["torch.bfloat16"] * 6
