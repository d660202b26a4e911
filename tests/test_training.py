"""Claims about distill/training.py: fit() learns, resumes to the bit, keeps the best.
Damaged checkpoints are test_checkpoint.py's, stages and run folders test_pipeline.py's, two processes
test_distributed.py's."""

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
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from distill import tiny
from distill.attention import show_attention
from distill.checkpoint import Checkpoints, cpu_state
from distill.data import Batches, Collator, tokenize
from distill.interruption import Interrupted
from distill.layer_map import LayerMapOptions, build_layer_map
from distill.losses import (
    AttentionLoss,
    EmbeddingLoss,
    HiddenLoss,
    LabelLoss,
    LogitsLoss,
    LossTerm,
    Match,
    RelationLoss,
)
from distill.objective import Objective
from distill.settings import RunError
from distill.students import Student, StudentOptions, build_student, student_config
from distill.tasks import TASKS
from distill.training import FitResult, TrainingOptions, Validation, distillation_loss, fit, total_steps
from tests.builders import ListTracker, new_session

TASK = TASKS["single_label_classification"]
LAYERS: dict[str, LossTerm] = {"embedding": EmbeddingLoss(), "attention": AttentionLoss(), "hidden": HiddenLoss()}
PREDICTION: dict[str, LossTerm] = {"logits": LogitsLoss(), "labels": LabelLoss()}
OPTIONS = TrainingOptions(
    max_steps=12, batch_size=16, learning_rate=1e-3, save_every_steps=5, evaluate_every_steps=4, log_every_steps=1
)


@pytest.fixture(scope="module")
def features() -> Any:
    return tokenize(tiny.load()["train"], TASK, tiny.tokenizer(), 32, "encode")


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    config = BertConfig(
        vocab_size=len(tiny.tokenizer()),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = BertForSequenceClassification(config).eval().requires_grad_(False)
        model.classifier.weight.mul_(20)  # a teacher with opinions
    show_attention(model)
    return model


class Setting:
    """One training on the toy: everything is new but the features, the teacher and the folder."""

    def __init__(self, features: Any, teacher: PreTrainedModel, folder: Path) -> None:
        self.features, self.teacher, self.folder = features, teacher, folder

    def student(self, dropout: float = 0.1) -> Student:
        shape = StudentOptions(layers=2, width=24, heads=4, intermediate_size=48, dropout=dropout)
        return build_student(student_config(self.teacher.config, shape), TASK, shape, 32, seed=3)

    def objective(self, terms: dict[str, LossTerm]) -> Objective:
        return Objective(terms, Match(build_layer_map(LayerMapOptions(), 2, 4), TASK.logits))

    def batches(self, options: TrainingOptions) -> Batches:
        return Batches(
            self.features,
            Collator(tiny.tokenizer(), TASK),
            batch_size=options.batch_size,
            accumulation=options.gradient_accumulation_steps,
            seed=5,
        )

    def fit(
        self,
        student: Student,
        options: TrainingOptions = OPTIONS,
        *,
        terms: dict[str, LossTerm] | None = None,
        folder: str = "unbroken",
        stop_after: int | None = None,
        validation: Validation | None = None,
        tracker: ListTracker | None = None,
    ) -> FitResult:
        session = new_session(tracker, stop_after)
        student.to(session.accelerator.device)
        self.teacher.to(session.accelerator.device)
        return fit(
            student,
            self.teacher,
            self.objective({**LAYERS, **PREDICTION} if terms is None else terms),
            self.batches(options),
            options,
            session,
            name="task.test",
            checkpoints=Checkpoints(self.folder / folder, session.accelerator),
            validation=validation,
        )

    def held_out(self, student: Student) -> Validation:
        """The loss on the training rows without dropout, as the intermediate phase validates."""

        def run() -> dict[str, float]:
            accelerator = new_session().accelerator
            objective = self.objective({**LAYERS, **PREDICTION})
            return distillation_loss(student, self.teacher, objective, self.batches(OPTIONS), accelerator)

        return Validation(run, "loss", higher_is_better=False)


@pytest.fixture
def setting(features: Any, teacher: PreTrainedModel, tmp_path: Path) -> Setting:
    torch.manual_seed(0)
    return Setting(features, teacher, tmp_path)


def require_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


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

    taught, tracker = Setting(setting.features, first.model.requires_grad_(False), setting.folder), ListTracker()
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
    return Setting(setting.features, setting.teacher, setting.folder / name)


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
