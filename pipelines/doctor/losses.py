"""The check of the losses: each term's value and its share of the gradient on one batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.activations import Activations, Needs, capture
from distill.attention import show_attention
from distill.balance import GradientBalance, gradient_norms, gradient_shares
from distill.data import Placement
from distill.losses import Logits, LossTerm, Match
from distill.objective import Objective
from distill.students import Student, build_student
from distill.teachers import load_encoder
from distill.training import StepSource, TrainingOptions
from pipelines import general
from pipelines.doctor.finding import Finding, Level
from pipelines.doctor.preflight import Preflight
from pipelines.run import Run

LOSS_ROWS = 32
"""Examples of the batch on which losses and gradients are measured."""


@dataclass(frozen=True)
class _Phase:
    """A training that is still to do.

    losses, training: keys of its loss terms and of its options in the config. of_encoder: teacher and student are
    encoders without a task head.
    """

    name: str
    losses: str
    training: str
    terms: Mapping[str, LossTerm]
    logits: Logits
    options: TrainingOptions
    batch: dict[str, Tensor]
    of_encoder: bool


class _OneStep:
    """A source of one batch."""

    steps_per_epoch: int | None = 1

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch = batch

    def steps(self, first: int, last: int) -> Iterator[list[dict[str, Tensor]]]:
        yield [self.batch]


def check_losses(preflight: Preflight) -> list[Finding]:
    """Each term's value and its share of the gradient on one batch, at the weights that the student starts with."""
    models: dict[bool, tuple[PreTrainedModel, Student]] = {}
    findings: list[Finding] = []
    for phase in _phases(preflight):
        if phase.of_encoder not in models:
            models[phase.of_encoder] = _models(preflight, phase)
        findings += _measure(preflight.run, phase, *models[phase.of_encoder])
    return findings


def _phases(preflight: Preflight) -> Iterator[_Phase]:
    run, config = preflight.run, preflight.run.config
    to_do = {one.stage.name for one in preflight.due if not one.done}
    if config.general is not None and "general" in to_do:
        batch = _few(general.batches(run, Placement()), run.device)
        yield _Phase(
            "general",
            "general.losses",
            "general.training",
            config.general.losses.intermediate(),
            Logits.CLASSES,
            config.general.training,
            batch,
            of_encoder=True,
        )
    if config.task is None or "task" not in to_do:
        return
    ready = preflight.teacher_is_ready
    measurable = ready and run.pieces_correspond
    for phase, terms in config.task.terms().items():
        if phase == "intermediate" or measurable:
            name, options, both = f"task.{phase}", getattr(config.task, phase), run.paired_encoded
            batch = _few(both.batches(both.features["train"], options, placement=Placement()), run.device)
            yield _Phase(name, "task.losses", name, terms, run.task.logits, options, batch, not ready)


def _few(source: StepSource, device: torch.device) -> dict[str, Tensor]:
    """LOSS_ROWS examples of the first step, weighing the same."""
    few = {name: tensor[:LOSS_ROWS].to(device) for name, tensor in next(iter(source.steps(0, 1)))[0].items()}
    few["example_weight"] = torch.full_like(few["example_weight"], 1 / len(few["example_weight"]))
    return few


def _models(preflight: Preflight, phase: _Phase) -> tuple[PreTrainedModel, Student]:
    """Teacher and student as the stage would begin, but that a student is cut out of its teacher by this one batch (by
    more it takes a minute), and that of the task has not been through the general stage."""
    run = preflight.run
    teacher = load_encoder(run.checkpoint).to(run.device) if phase.of_encoder else preflight.teacher
    task = None if phase.of_encoder else run.task
    student = build_student(
        run.student_config(), task, run.config.student, teacher.config.hidden_size, run.config.seed, run.cut
    )
    general.initialize(run, student, teacher, _OneStep(phase.batch))
    show_attention(teacher)
    return teacher, student.to(run.device).eval()


def _measure(run: Run, phase: _Phase, teacher: PreTrainedModel, student: Student) -> list[Finding]:
    objective = Objective(phase.terms, Match(run.layer_map, phase.logits))
    targets = Activations()
    with torch.no_grad():
        if objective.teacher_needs != Needs():
            targets = capture(teacher, phase.batch, objective.teacher_needs)
        with run.accelerator.autocast():
            own = student(phase.batch, objective.student_needs)
        values = {name: float(value) for name, value in objective(own, targets, phase.batch).parts.items()}
    subject = f"losses {phase.name}"
    broken = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    if broken:
        remedy = "Train in float32 (runtime.precision=fp32), or check the teacher's weights: they may not be finite."
        return [Finding(Level.ERROR, subject, f"on the first batch {', '.join(broken)}", remedy)]
    norms, weights = gradient_norms(student, targets, objective, phase.batch, run.accelerator), objective.weights
    if phase.options.balance == "gradient":
        balance = GradientBalance(weights)
        balance.add(norms)
        weights = balance.weights()
    shares = gradient_shares(norms, weights)
    each = ", ".join(f"{name} {values[name]:.3g} ({shares[name]:.1%})" for name in values)
    examples = len(phase.batch["input_ids"])
    message = f"{each}: value (share of the gradient) on {examples} examples, at the student's first weights"
    inert = [name for name, share in shares.items() if share < 0.01]
    return [
        Finding(Level.OK, subject, message),
        *(_inert(phase, name, shares[name], norms, weights) for name in inert),
    ]


def _inert(phase: _Phase, name: str, share: float, norms: Mapping[str, float], weights: Mapping[str, float]) -> Finding:
    key, subject = f"{phase.losses}.{name}", f"losses {phase.name}"
    message = f"{name} has {share:.2%} of the gradient: it teaches next to nothing"
    others = sum(weights[other] * norms[other] for other in norms if other != name)
    if weights[name] == 0:
        return Finding(Level.WARNING, subject, message, f"Its weight is 0: set {key}=null, which saves its cost.")
    if norms[name] == 0 or others == 0 or phase.options.balance == "gradient":
        remedy = f"Raise {key}.weight if it should teach, or set {key}=null, which saves its cost."
        return Finding(Level.WARNING, subject, message, remedy)
    # w n = s (w n + others) at a share s of one tenth.
    weight = float(f"{others / 9 / norms[name]:.2g}")
    return Finding(
        Level.WARNING,
        subject,
        message,
        f"{key}.weight={weight:g} would give it a tenth, {phase.training}.balance=gradient every term the share of "
        f"its weight; {key}=null saves its cost.",
    )
