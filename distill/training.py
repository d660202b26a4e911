"""fit(): the only loop that calls backward. Every stage that trains passes other parts to it.
Batches are left to data.py, the losses to objective.py, what is watched to monitoring.py, files to checkpoint.py."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.activations import Activations, Needs, capture
from distill.balance import GradientBalance, gradient_norms, gradient_shares
from distill.checkpoint import Checkpoints, cpu_state
from distill.interruption import Interrupted, Interruption
from distill.monitoring import Fall, Guard, Meter, Progress
from distill.objective import Objective
from distill.optimizer import build_optimizer, learning_rate_factor
from distill.settings import settings
from distill.sharding import Shards, whole
from distill.students import Student
from distill.teacher_states import TeacherStates
from distill.tracking import Tracker


@settings
class TrainingOptions:
    epochs: PositiveFloat = 3
    """Passes over the training rows; may be a fraction. Not used where max_steps is set."""
    max_steps: PositiveInt | None = None
    """Optimisation steps; needed for streaming corpora."""
    batch_size: PositiveInt = 32
    """Examples of one optimisation step, over all processes and accumulation steps."""
    gradient_accumulation_steps: PositiveInt = 1
    """Parts that a process cuts its share of a step into; more parts need less memory."""
    learning_rate: PositiveFloat = 5e-5
    """Peak rate of AdamW."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """After warm-up: decay to 0, linearly or as a cosine, or none."""
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps in which the rate rises linearly."""
    weight_decay: NonNegativeFloat = 0.01
    """Of matrices; biases and LayerNorms do not decay."""
    max_gradient_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    measure_gradients_every_steps: PositiveInt = 100
    """Measure each loss term's share of the gradient this often (a forward pass and a backward pass a term); logged as
    gradient_share/TERM. Not done for a single term."""
    balance: Literal["none", "gradient"] = "none"
    """gradient: weights are adapted at every measurement so that each term's share of the gradient is its configured
    weight's share of all weights; none: weights stay as configured."""
    evaluate_every_steps: PositiveInt | None = None
    """Validate and choose the best weights this often; once an epoch where not given."""
    save_every_steps: PositiveInt = 200
    """Checkpoint this often; a signal saves at once."""
    log_every_steps: PositiveInt = 10
    """Log losses, rate and speed this often."""


class StepSource(Protocol):
    """Batches by step; see data.Batches and corpus.StreamBatches."""

    steps_per_epoch: int | None

    def steps(self, first: int, last: int) -> Iterator[list[dict[str, Tensor]]]: ...


class TrainingSource(StepSource, Protocol):
    """What fit needs of its data: it tells the rows of a step that was not taken."""

    def rows(self, step: int) -> list[int]: ...


@dataclass(frozen=True)
class Validation:
    """How weights are chosen: `run` gives figures, `select` names the one that decides."""

    run: Callable[[], dict[str, float]]
    select: str
    higher_is_better: bool


@dataclass(frozen=True)
class FitResult:
    """Steps and tokens of the whole training, resumed parts included; best validation figures; seconds of this call;
    steps that were not taken; the mean loss over the first and the last quarter of the steps."""

    steps: int
    tokens: int
    best_step: int | None
    best: dict[str, float]
    seconds: float
    skipped_steps: int
    first_loss: float | None
    last_loss: float | None

    def figures(self) -> dict[str, Any]:
        """What a stage's result.json says of it."""
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "skipped_steps": self.skipped_steps,
            "loss": {"first": self.first_loss, "last": self.last_loss},
        }


@dataclass(frozen=True)
class Session:
    """What all trainings of a run share."""

    accelerator: Accelerator
    tracker: Tracker
    interruption: Interruption
    on_nonfinite: Literal["stop", "skip"] = "stop"
    sharded: bool = False
    """Cut gradients and moments over the processes (FSDP); see sharding.Shards."""


def total_steps(options: TrainingOptions, steps_per_epoch: int | None) -> int:
    """max_steps, or epochs times the steps of an epoch."""
    if options.max_steps is not None:
        return options.max_steps
    if steps_per_epoch is None:
        raise ValueError("a streaming corpus has no epochs: set max_steps")
    return max(1, math.ceil(options.epochs * steps_per_epoch))


def fit(
    student: Student,
    teacher: PreTrainedModel | TeacherStates | None,
    objective: Objective,
    batches: TrainingSource,
    options: TrainingOptions,
    session: Session,
    *,
    name: str,
    checkpoints: Checkpoints,
    validation: Validation | None = None,
) -> FitResult:
    """Train `student` in place against `teacher` and leave it with its best weights, in eval mode.

    Resumes from the newest checkpoint where there is one. Changes nothing but `student` and the checkpoints.

    Args:
        teacher: frozen, on the device, in eval mode unless its dropout is wanted in the targets; its states where the
            batches hold them, and its logits (teacher_logits) where a term compares these too; None where no term of
            the objective uses one, or the batches hold its logits and no term needs more.
        name: the stage's name in the log, for instance task.intermediate.
        validation: without it the last weights are kept.

    Raises:
        Interrupted: after a signal, once the checkpoint is saved.
        RunError: a loss or a gradient that is not finite, unless such steps are to be skipped and few follow each
            other; a disk that does not take a checkpoint.
    """
    accelerator, started = session.accelerator, time.monotonic()
    last = total_steps(options, batches.steps_per_epoch)
    warmup = round(options.warmup_fraction * last)
    evaluate_every = options.evaluate_every_steps or batches.steps_per_epoch or last

    # Dropout follows from the seed alone: not from what ran before in this process, which a resumed run skips.
    torch.manual_seed(torch.initial_seed())
    student.to(accelerator.device)
    _freeze_unused(student, teacher, objective, next(batches.steps(0, 1))[0], accelerator)
    model: Any
    if session.sharded:
        model = Shards(student, accelerator)
        optimizer = accelerator.prepare(model.optimizer(options.learning_rate, options.weight_decay))
    else:
        optimizer = build_optimizer(student, options.learning_rate, options.weight_decay)
        model, optimizer = accelerator.prepare(student, optimizer)
    state = checkpoints.load() or {
        "step": 0,
        "tokens": 0,
        "best_step": None,
        "best": {},
        "gradient_norms": {},
        "skipped_steps": 0,
        "fall": {},
    }
    if session.sharded:
        model.scatter()
    balance = GradientBalance(objective.weights, state["gradient_norms"])
    weights = balance.weights() if options.balance == "gradient" else objective.weights
    session.tracker.begin_stage(name, state["step"])
    progress, meter = Progress(accelerator, name, state["step"], last), Meter(state["tokens"])
    guard = Guard(name, batches.rows, session.tracker, session.on_nonfinite, state["skipped_steps"])
    fall = Fall(last, options.log_every_steps, state["fall"])
    shares: dict[str, float] = {}

    def gather() -> None:
        """Bring `student` up to date where shards train in its place."""
        if session.sharded:
            model.gather()

    def validate(step: int) -> None:
        assert validation is not None
        gather()
        noisy = [model for model in (student, teacher) if isinstance(model, nn.Module) and model.training]
        for model in noisy:
            model.eval()
        figures = validation.run()
        for model in noisy:
            model.train()
        session.tracker.log(name, step, {f"validation/{key}": value for key, value in figures.items()})
        if _better(figures, state["best"], validation):
            state.update(best=figures, best_step=step)
            checkpoints.save_best(step, cpu_state(student))
        progress.note(validation.select, figures[validation.select])

    student.train()
    for step, micro_batches in enumerate(batches.steps(state["step"], last), start=state["step"]):
        rate = options.learning_rate * learning_rate_factor(options.schedule, step, last, warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for part, cpu_batch in enumerate(micro_batches, start=1):
            state["tokens"] += int(cpu_batch["attention_mask"].sum()) * accelerator.num_processes
            batch = _on_device(cpu_batch, accelerator.device)
            targets = _teach(teacher, batch, objective.teacher_needs)
            if part == 1 and len(weights) > 1 and step % options.measure_gradients_every_steps == 0:
                gather()
                balance.add(norms := gradient_norms(student, targets, objective, batch, accelerator))
                state["gradient_norms"] = balance.norms
                weights = balance.weights() if options.balance == "gradient" else weights
                shares = {f"gradient_share/{term}": share for term, share in gradient_shares(norms, weights).items()}
            with accelerator.no_sync(model) if part < len(micro_batches) else nullcontext():
                report = objective(model(batch, objective.student_needs), targets, batch, weights)
                accelerator.backward(report.total)
            meter.add(report.total.detach(), report.parts)
        norm = whole(accelerator.clip_grad_norm_(model.parameters(), options.max_gradient_norm))
        figures = meter.step_figures(norm)
        optimizer.optimizer.found_inf = refused = guard.refuse(step, figures)
        meter.close_step(figures, refused)
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        progress.advance()
        logs = done % options.log_every_steps == 0 or done == last
        validates = validation is not None and (done % evaluate_every == 0 or done == last)
        if logs or validates:  # both wait for the device in any case
            state["skipped_steps"] = guard.check()
        if logs:
            read = meter.read(rate, state["tokens"])
            state["fall"] = fall.add(done, meter.steps_read, sum(w * read[t] for t, w in objective.weights.items()))
            session.tracker.log(name, done, {f"train/{key}": value for key, value in read.items()} | shares)
            shares = {}
            progress.note("loss", read["loss"])
        if validates:
            with meter.paused():
                validate(done)
        signum = session.interruption.requested()
        if signum or (done % options.save_every_steps == 0 and done < last):
            state["skipped_steps"] = guard.check()
            with meter.paused():
                gather()
                checkpoints.save(done, {key: value for key, value in state.items() if key != "step"})
        if signum:
            progress.close()
            raise Interrupted(signum)
    progress.close()

    accelerator.wait_for_everyone()
    gather()
    if state["best_step"] is not None:
        student.load_state_dict(checkpoints.load_best(state["best_step"]))
    # Takes the autocast wrapper off again, so that the next training does not put a second one around it, and the mark,
    # lest accelerate pass over a student that it prepared before and leave its next training without autocast.
    accelerator.unwrap_model(student, keep_fp32_wrapper=False)
    vars(student).pop("_is_accelerate_prepared", None)
    accelerator.free_memory()
    student.eval().requires_grad_(True)
    if accelerator.is_main_process:
        fall.report(name)
    return FitResult(
        last,
        state["tokens"],
        state["best_step"],
        state["best"],
        time.monotonic() - started,
        state["skipped_steps"],
        *fall.means(),
    )


def distillation_loss(
    student: Student, teacher: PreTrainedModel | None, objective: Objective, batches: Any, accelerator: Accelerator
) -> dict[str, float]:
    """The objective and its parts on held-out rows, a mean over examples; no gradient."""
    sums: dict[str, Tensor] = {}
    examples = len(batches.lengths)
    with torch.no_grad():
        for index, micro_batches in enumerate(batches.steps(0, batches.steps_per_epoch)):
            for cpu_batch in micro_batches:
                batch = _on_device(cpu_batch, accelerator.device)
                targets = _teach(teacher, batch, objective.teacher_needs)
                with accelerator.autocast():
                    activations = student(batch, objective.student_needs)
                report = objective(activations, targets, batch)
                weight = batches.step_examples(index) / examples
                for name, value in {"loss": report.total, **report.parts}.items():
                    sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value * weight
    means = reduce(torch.stack(list(sums.values())), reduction="mean").tolist()
    return dict(zip(sums, means, strict=True))


def _teach(teacher: PreTrainedModel | TeacherStates | None, batch: Mapping[str, Tensor], needs: Needs) -> Activations:
    if isinstance(teacher, TeacherStates):
        return teacher.activations(batch)
    if "teacher_logits" in batch and needs == Needs(logits=True):
        return Activations(logits=batch["teacher_logits"])
    if teacher is None or needs == Needs():
        return Activations()
    with torch.no_grad():
        return capture(teacher, batch, needs)


def _on_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def _freeze_unused(
    student: Student,
    teacher: PreTrainedModel | TeacherStates | None,
    objective: Objective,
    batch: Mapping[str, Tensor],
    accelerator: Accelerator,
) -> None:
    """Freeze what the objective gives no gradient to (a task head in the intermediate phase): DDP fails on its second
    step otherwise, and an optimizer would decay weights that nothing trains. Found by one backward pass."""
    few = _on_device({name: tensor[:2] for name, tensor in batch.items()}, accelerator.device)
    with torch.random.fork_rng(devices=[accelerator.device] if accelerator.device.type == "cuda" else []):
        activations = student(few, objective.student_needs)
        report = objective(activations, _teach(teacher, few, objective.teacher_needs), few)
        accelerator.backward(report.total)
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


def _better(figures: Mapping[str, float], best: Mapping[str, float], validation: Validation) -> bool:
    """Later weights win a tie: they have seen more. A figure that is not finite never wins over one that is."""
    value = figures[validation.select]
    if not best or not math.isfinite(best[validation.select]):
        return True
    return value >= best[validation.select] if validation.higher_is_better else value <= best[validation.select]
