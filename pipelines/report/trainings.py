"""How the trainings of a run went, and what they took: losses, validation, time, cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from distill.config import Config
from pipelines.report import plots
from pipelines.report.blocks import Block, Figure, Group, Missing, Table
from pipelines.report.record import Record, Training
from pipelines.run import Run

TITLES = {
    "teacher": "Teacher: fine-tuning",
    "general": "General distillation",
    "masked_lm": "Masked language model for augmentation",
    "task.intermediate": "Task distillation 1: intermediate layers",
    "task.logits": "Task distillation 2: logits",
    "evaluate.undistilled": "Same student on the labels alone",
}
STAGES = {
    "teacher": "teacher",
    "general": "general",
    "masked_lm": "masked LM",
    "augment": "augment",
    "task": "task",
    "evaluate": "evaluate",
    "export": "export",
}


def curves(run: Run, record: Record) -> list[Block]:
    """Loss parts and validation figures of every training there was, and why others were not."""
    level = _teacher_level(run, record)
    blocks: list[Block] = []
    for name, training in record.trainings.items():
        teaches = name in ("task.logits", "evaluate.undistilled")
        figures = [*_losses(training), *_validations(run, training, level if teaches else None)]
        if figures:
            blocks.append(Group(figures, title=TITLES.get(name, name)))
    absent = [text for name, text in _absent(run.config) if name not in record.trainings]
    if absent:
        blocks.append(Missing(" ".join(absent)))
    return blocks


def _losses(training: Training) -> Iterator[Figure]:
    losses = training.losses
    if not any(losses.values()):
        return
    parts = {name: points for name, points in losses.items() if name != "loss"}
    # With one part the total is that part times its weight: one line says it all.
    shown = losses if len(parts) != 1 else parts
    values = [value for points in shown.values() for value in points.values()]
    wide = min(values) > 0 and max(values) > 10 * min(values)
    yield Figure(
        "Loss" if len(shown) == 1 else "Loss and its parts",
        plots.curves(
            f"loss-{training.name}",
            f"Losses of {training.name} over steps: {', '.join(shown)}.",
            shown,
            ylabel="loss (log scale)" if wide else "loss",
            logarithmic=wide,
        ),
        "" if len(shown) == 1 else "Parts before their weights; loss is their weighted sum.",
    )


def _validations(run: Run, training: Training, level: tuple[str, float] | None) -> Iterator[Figure]:
    if not training.validation:
        return
    chosen_by_loss = "loss" in training.validation
    figure = "loss" if chosen_by_loss else run.metric
    points = training.validation.get(figure, {})
    if not points:
        return
    best = kept_step(points, higher_is_better=not chosen_by_loss)
    yield Figure(
        f"Validation {figure}",
        plots.curves(
            f"validation-{training.name}",
            f"Validation {figure} of {training.name}: best {points[best]:.4g} at step {best}.",
            {figure: points},
            ylabel=f"validation {figure}",
            best=best,
            level=level,
            colour=_colour(training.name),
        ),
        f"Best {points[best]:.4g} at step {best} of {max(points)}: those weights were kept.",
    )


def kept_step(points: Mapping[int, float], *, higher_is_better: bool) -> int:
    """The step whose weights the training kept: the best, and of equals the last."""
    sign = 1 if higher_is_better else -1
    return max(points, key=lambda step: (sign * points[step], step))


def _colour(name: str) -> str:
    return plots.COLOURS[{"teacher": "teacher", "evaluate.undistilled": "undistilled"}.get(name, "student")]


def _teacher_level(run: Run, record: Record) -> tuple[str, float] | None:
    if run.config.task is None:
        return None
    validation = record.results.get("teacher", {}).get("validation", {})
    return ("teacher", validation[run.metric]) if run.metric in validation else None


def _absent(config: Config) -> Iterator[tuple[str, str]]:
    """Trainings that the config leaves out."""
    if config.general is None:
        yield "general", "There was no general distillation (general: null)."
    if config.task is None:
        yield "task", "There was no task (task: null): no labels, no logits, nothing to validate by."
        return
    if config.teacher.training is None:
        yield "teacher", "The teacher was given fine-tuned (teacher.training: null), so its training is not known here."
    if config.task.intermediate is None:
        yield "task.intermediate", "There was no phase on intermediate layers (task.intermediate: null)."
    if config.task.logits is None:
        yield "task.logits", "There was no phase on logits (task.logits: null)."
    if not config.evaluate.undistilled:
        yield "evaluate.undistilled", "No student was trained on the labels alone (evaluate.undistilled: false)."


def duration(seconds: float) -> str:
    """Two units at most."""
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def costs(record: Record, price_per_hour: float | None) -> list[Block]:
    """Seconds, tokens, speed and cost of each stage that is finished."""
    if not record.results:
        return [Missing("No stage has finished.")]
    seconds = {name: float(result["seconds"]) for name, result in record.results.items()}
    whole = sum(seconds.values())

    def cost(of: float) -> list[str]:
        return [] if price_per_hour is None else [f"{of / 3600 * price_per_hour:,.2f}"]

    rows = [
        (
            STAGES.get(name, name),
            duration(of),
            f"{of / whole:.0%}" if whole else "",
            _number(record.results[name].get("tokens")),
            _speed(record, name),
            *cost(of),
        )
        for name, of in seconds.items()
    ]
    rows.append(("all", duration(whole), "", "", "", *cost(whole)))
    heads = ["stage", "time", "share", "tokens", "tokens/s", *([] if price_per_hour is None else ["cost"])]
    note = (
        "tokens: word pieces through the student (the teacher, in its own training); tokens/s: median while training."
    )
    if price_per_hour is not None:
        note += f" Cost at {price_per_hour:g} an hour of what the run ran on."
    if resumed := [name for name, training in record.trainings.items() if _was_resumed(training, seconds)]:
        note += f" Stopped and gone on with: {', '.join(resumed)}; its time is that of the last start alone."
    figure = Figure(
        "Time by stage",
        plots.pairs_of_bars(
            "time",
            "Minutes of each stage.",
            [STAGES.get(name, name) for name in seconds],
            {"student": [of / 60 for of in seconds.values()]},
            "minutes",
        ),
    )
    blocks: list[Block] = [Table("By stage", heads, rows, note), Group([figure])]
    if price_per_hour is None:
        blocks.append(Missing("Cost: give --price-per-hour to have a column of it."))
    return blocks


def _speed(record: Record, stage: str) -> str:
    """Of the stage's trainings; several are several figures."""
    own = [training for name, training in record.trainings.items() if name.split(".")[0] == stage]
    return " / ".join(f"{speed:,.0f}" for training in own if (speed := training.tokens_per_second) is not None)


def _was_resumed(training: Training, seconds: Mapping[str, float]) -> bool:
    """A stage cannot log for longer than it took, unless it took several starts."""
    own = seconds.get(training.name.split(".")[0])
    return own is not None and len(training.times) > 1 and max(training.times) - min(training.times) > own + 1


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"
