"""What a run was told to do: layers, losses, weights, trainings, data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig

from distill.config import dump_config, to_plain
from distill.losses import LossTerm
from distill.training import TrainingOptions
from pipelines.report import plots
from pipelines.report.blocks import Block, Code, Figure, Group, Table, Tables
from pipelines.report.record import Record
from pipelines.report.trainings import STAGES
from pipelines.run import Run

PHASES = {
    "teacher": "teacher",
    "general": "general",
    "task.intermediate": "task, layers",
    "task.logits": "task, logits",
}
"""Trainings, short enough for a column of a table."""


def recipe(run: Run, record: Record) -> list[Block]:
    """The layer map drawn, and tables of the rest."""
    pairs = run.layer_map
    drawn = Figure(
        "Layer map",
        plots.layer_map(
            "layer-map",
            f"Layer map: {pairs.describe()}.",
            (pairs.student_layers, pairs.teacher_layers),
            pairs.attention,
            pairs.hidden,
        ),
        f"{pairs.describe()} ({'given pair by pair' if _given(run) else f'strategy {run.config.layer_map.strategy}'}).",
    )
    blocks: list[Block] = [Group([drawn]), _shapes(run)]
    trainings = Table(
        "Trainings", ("phase", "length", "batch", "rate", "schedule"), [*_trainings(run, record)], texts=True
    )
    note = "A phase minimises the weighted sum of its terms."
    losses = Table("Losses", ("phase", "term", "weight", "form"), list(_losses(run)), note, texts=True)
    blocks.append(Tables([losses, trainings]))
    data = Table("Data", ("what", "count"), list(_data(run, record)))
    blocks.append(Tables([data, Table("Otherwise", ("setting", "value"), list(_settings(run)), texts=True)]))
    blocks.append(Code("All settings (config.yaml): running them again repeats the run", dump_config(run.config)))
    return blocks


def _given(run: Run) -> bool:
    options = run.config.layer_map
    return any((options.pairs, options.attention_pairs, options.hidden_pairs))


def _shapes(run: Run) -> Table:
    student = run.config.student

    def of(config: PreTrainedConfig) -> list[str]:
        names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
        width = getattr(config, "embedding_size", None) or config.hidden_size
        return [*(str(getattr(config, name, "")) for name in names), str(width)]

    teacher, own = run.checkpoint.config, run.student_config()
    rows = [
        ("teacher", run.config.teacher.model, teacher.model_type, *of(teacher)),
        ("student", f"starts from: {student.initialization}", own.model_type, *of(own)),
    ]
    return Table(
        "Shapes", ("model", "weights", "family", "layers", "width", "heads", "inner", "embeddings"), rows, texts=True
    )


def _losses(run: Run) -> Iterator[tuple[str, str, str, str]]:
    config = run.config
    phases: dict[str, Mapping[str, LossTerm]] = {}
    if config.general is not None:
        phases["general"] = config.general.losses.intermediate()
    if config.task is not None:
        phases |= {f"task.{phase}": terms for phase, terms in config.task.terms().items()}
    for phase, terms in phases.items():
        for name, term in terms.items():
            plain: Mapping[str, Any] = to_plain(term)
            form = ", ".join(f"{key} {value}" for key, value in plain.items() if key != "weight" and value is not None)
            yield PHASES[phase], name, f"{term.weight:g}", form


def _trainings(run: Run, record: Record) -> Iterator[tuple[str, str, str, str, str]]:
    config = run.config
    options: dict[str, TrainingOptions | None] = {
        "teacher": config.teacher.training if config.task is not None else None,
        "general": config.general.training if config.general is not None else None,
        "task.intermediate": config.task.intermediate if config.task is not None else None,
        "task.logits": config.task.logits if config.task is not None else None,
    }
    for name, one in options.items():
        if one is not None:
            length = (
                f"{one.max_steps:,} steps"
                if one.max_steps is not None
                else f"{one.epochs:g} epoch{'s' if one.epochs != 1 else ''}"
            )
            steps = _steps(record, name)
            taken = f" ({steps:,} steps)" if steps is not None and one.max_steps is None else ""
            balance = ", terms balanced by gradient" if one.balance == "gradient" else ""
            yield PHASES[name], length + taken, f"{one.batch_size:,}", f"{one.learning_rate:g}", one.schedule + balance


def _steps(record: Record, name: str) -> int | None:
    stage, _, phase = name.partition(".")
    result = record.results.get(stage, {})
    found: int | None = (result.get("phases", {}).get(phase, {}) if phase else result).get("steps")
    return found


def _data(run: Run, record: Record) -> Iterator[tuple[str, str]]:
    if run.config.task is not None:
        for split, rows in run.data.splits.items():
            yield f"{split} rows", f"{len(rows):,}"
        if run.data.names:
            yield "labels", f"{len(run.data.names):,}"
    if "augment" in record.results:
        yield "augmented rows kept", f"{record.results['augment']['kept']:,}"
    if "unlabelled_rows" in record.results.get("task", {}):
        yield "unlabelled rows", f"{record.results['task']['unlabelled_rows']:,}"
    if "training_rows" in record.results.get("task", {}):
        yield "rows of the task distillation", f"{record.results['task']['training_rows']:,}"
    for stage, result in record.results.items():
        if "tokens" in result:
            yield f"word pieces trained on, {STAGES.get(stage, stage)}", f"{result['tokens']:,}"


def _settings(run: Run) -> Iterator[tuple[str, str]]:
    config = run.config
    yield "preset", config.preset
    yield "seed", str(config.seed)
    yield "precision of training", config.runtime.precision
    if config.task is not None:
        data = config.data
        yield "data", " ".join(filter(None, (data.path, data.name)))
        yield "word pieces of a text, at most", str(data.max_length)
        yield "deciding figure", run.metric
    if config.general is not None:
        corpus = config.general.corpus
        yield "corpus", " ".join(filter(None, (corpus.path, corpus.name)))
    if config.augment is not None and config.task is not None:
        options = config.augment
        yield "augmentation", f"{options.copies} copies, words replaced with probability {options.probability:g}"
    elif config.task is not None:
        yield "augmentation", "none"
