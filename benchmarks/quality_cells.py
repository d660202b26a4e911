"""One run of benchmarks/quality.py: a task, a system, a student size, a seed, trained for a budget of seconds.
Ours are runs of the pipeline, the peer is benchmarks/textbrewer.py on the pipeline's rows. Which cells are run, and
where their figures go, is left to quality.py."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.quality_tasks import SIZES, TEACHER, Task, runtime, teacher_config, write_splits
from benchmarks.textbrewer import TextBrewer
from distill.checkpoint import write_json
from distill.config import Config, parse_config
from distill.settings import UserError
from distill.students import build_student
from distill.training import TrainingOptions
from pipelines.encoded import Encoded
from pipelines.machine import machine
from pipelines.pipeline import prepare, run_stages
from pipelines.run import Run, close_run, open_run

BATCH_SIZE = 32
VALIDATIONS = 8
"""Of a phase; its best weights are kept."""
INTERMEDIATE_SHARE = 0.6
"""Of the budget, where a system has no opinion."""
PROBE_STEPS = (4, 16)
"""A step's cost is what the second number of steps takes more than the first, over the difference."""
TEXTBREWER_ROUNDS = 8
TEXTBREWER_RATE, TEXTBREWER_TEMPERATURE = 1e-4, 8.0
"""Of TextBrewer's own examples with TinyBERT's shape."""

Phases = Mapping[str, dict[str, Any]]
"""Training options by phase, without their length."""


@dataclass(frozen=True)
class System:
    """What learns. phases: their training options, without the length; shares: of the budget, by phase; losses: of
    task.losses; student: of the section student, beside its shape; sections: whole sections of the config that no other
    field is about, for instance layer_map; general_steps: of general distillation beforehand, beside the budget."""

    preset: str
    phases: Phases
    shares: Mapping[str, float]
    losses: Mapping[str, Any]
    student: Mapping[str, Any]
    sections: Mapping[str, Any] = field(default_factory=dict)
    general_steps: int = 0


# The settings' own rates (5e-5, 3e-5) are TinyBERT's, for trainings of many epochs; configs/bbc_news.yaml has these.
_SHORT = {"intermediate": {"learning_rate": 5e-4}, "logits": {"learning_rate": 1e-4}}
_EPOCHS = {"paper": (20, 3), "reference": (10, 3)}
SYSTEMS: Mapping[str, System | None] = {
    "undistilled": System(
        "default",
        {"logits": {"learning_rate": 5e-4}},
        {"logits": 1.0},
        {"logits": None, "labels": {}},
        {"initialization": "random"},
    ),
    "default": System(
        "default", _SHORT, {"intermediate": INTERMEDIATE_SHARE, "logits": 1 - INTERMEDIATE_SHARE}, {}, {}
    ),
    **{
        name: System(
            name,
            {"intermediate": {}, "logits": {}},
            {"intermediate": first / (first + last), "logits": last / (first + last)},
            {},
            {},
        )
        for name, (first, last) in _EPOCHS.items()
    },
    "textbrewer": None,
}
"""Students; the presets keep their own rates and the ratio of their phases' epochs."""


@dataclass(frozen=True)
class Cell:
    """What one run measures; recipe: what the system named is, None for the peer."""

    task: Task
    system: str
    recipe: System | None
    size: str
    seed: int
    seconds: float
    """Of processor time on one thread that its training steps may take."""

    @property
    def key(self) -> dict[str, Any]:
        return {
            "task": self.task.name,
            "system": self.system,
            "size": self.size,
            "seed": self.seed,
            "budget_seconds": self.seconds,
        }


def measure_teacher(task: Task, data: Path, work: Path) -> dict[str, Any]:
    """Fine-tune the task's teacher, or go on with it; its figures. It lies in work/teachers and is made once."""
    write_splits(task, data, work / "rows" / task.name)
    with _opened(teacher_config(task, work)) as run:
        trained = run_stages(run, prepare(run, only=["teacher"]))
        teacher = run.load_task_teacher()
        return {
            **_figures(run, teacher, run.teacher_encoded),
            "training_seconds": trained["seconds"]["teacher"],
        }


def measure(cell: Cell, data: Path, work: Path, *, reported: str = "test") -> dict[str, Any]:
    """Train the cell's student for its budget, its teacher before it where there is none; its figures, on no other rows
    than those that chose the weights where `reported` is validation."""
    write_splits(cell.task, data, work / "rows" / cell.task.name)
    if not (work / "teachers" / cell.task.name / "teacher" / "result.json").is_file():
        measure_teacher(cell.task, data, work)
    if cell.recipe is not None and cell.recipe.general_steps:
        first = str(general_student(cell.recipe.general_steps, cell.size, data, work))
        student = {**cell.recipe.student, "initialization": first}
        cell = replace(cell, recipe=replace(cell.recipe, student=student))
    with tempfile.TemporaryDirectory(prefix="probe-", dir=work) as scratch:
        if cell.recipe is None:
            return _textbrewer(cell, work, Path(scratch))
        steps = _steps(cell, work, Path(scratch))
    # Beside other cells' folders: a stopped cell goes on from its checkpoint.
    folder = work / "runs" / "-".join(str(value) for value in cell.key.values())
    with _opened(_config(cell, work, folder, steps)) as run:
        clock = time.monotonic(), time.process_time()
        run_stages(run, prepare(run, only=["augment", "task"] if run.config.augment else ["task"]))
        seconds = time.monotonic() - clock[0], time.process_time() - clock[1]
        result = json.loads((folder / "task" / "result.json").read_text(encoding="utf-8"))
        student = run.task.auto_class.from_pretrained(folder / "task" / "student")
        figures = {
            **_figures(run, student, run.encoded, reported),
            "steps": steps,
            "training_seconds": sum(phase["seconds"] for phase in result["phases"].values()),
            "wall_seconds": seconds[0],
            "cpu_seconds": seconds[1],
        }
        if "vocabulary" in result:
            figures["vocabulary"] = result["vocabulary"]
    shutil.rmtree(folder)
    return figures


def general_student(steps: int, size: str, data: Path, work: Path) -> Path:
    """A student after general distillation on the books for so many steps of 2,048 word pieces, cut out of the packaged
    teacher and taught by it: a folder that student.initialization takes. It lies in work/general and is made once.

    Raises:
        UserError: there are no books under `data`.
    """
    files = sorted((data / "books").glob("train.*.txt.gz"))
    if not files:
        raise UserError(f"--data: {data} holds no books/train.*.txt.gz. Give the folder that holds books/.")
    folder = work / "general" / f"{size}-{steps}"
    student = folder / "general" / "student"
    if (folder / "general" / "result.json").is_file():
        return student
    config = parse_config(
        {
            "output": str(folder),
            "teacher": {"model": TEACHER},
            "student": SIZES[size].student(),
            "general": {
                "corpus": {"path": "text", "data_files": [str(file) for file in files]},
                "max_length": 64,
                "training": {"max_steps": steps, "batch_size": BATCH_SIZE, "learning_rate": 5e-4},
            },
            "task": None,
            "runtime": runtime(),
        }
    )
    with _opened(config) as run:
        run_stages(run, prepare(run, only=["general"]))
    return student


@contextmanager
def _opened(config: Config) -> Iterator[Run]:
    run = open_run(config)
    try:
        yield run
    finally:
        close_run(run)


def _figures(run: Run, model: PreTrainedModel, rows: Encoded, reported: str = "test") -> dict[str, Any]:
    """On the rows that chose the weights, and on those reported."""
    metrics = {split: rows.figures(model, split) for split in {"validation", reported}}
    return {
        "metric": run.metric,
        "value": metrics[reported][run.metric],
        "validation": metrics["validation"][run.metric],
        "metrics": metrics[reported],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "precision": run.config.runtime.precision,
        "cpu": machine()["cpu"],
        "threads": torch.get_num_threads(),
    }


def _config(
    cell: Cell, work: Path, folder: Path, steps: Mapping[str, int], *, validations: int = VALIDATIONS
) -> Config:
    system, size = cell.recipe, SIZES[cell.size]
    phases: dict[str, Any] = dict.fromkeys(("intermediate", "logits"))
    losses: Mapping[str, Any] = {}
    if system is not None:
        losses = system.losses
        for name, count in steps.items():
            phases[name] = {
                "batch_size": BATCH_SIZE,
                "measure_gradients_every_steps": 10 * count,
                **system.phases[name],
                "max_steps": count,
                "evaluate_every_steps": max(1, count // validations),
                "save_every_steps": max(200, count),
            }
    else:
        phases["logits"] = {"batch_size": BATCH_SIZE}
    return parse_config(
        {
            "preset": system.preset if system else "default",
            "output": str(folder),
            "seed": cell.seed,
            "teacher": {"model": str(work / "teachers" / cell.task.name / "teacher" / "model")},
            "student": {**size.student(), **(system.student if system else {"initialization": "random"})},
            "data": cell.task.data(work / "rows" / cell.task.name),
            "task": {"type": cell.task.type, "metric": cell.task.metric, "losses": losses, **phases},
            "evaluate": {"undistilled": False},
            "runtime": runtime(),
            **(system.sections if system else {}),
        }
    )


def _steps(cell: Cell, work: Path, scratch: Path) -> dict[str, int]:
    """Steps of each phase that its share of the budget pays. What a step costs is found once by task, system, size and
    phase and kept in work/, so that a cell that is stopped has the same number of steps when it goes on."""
    system, kept = cell.recipe, work / "step_seconds.json"
    assert system is not None
    # A step costs as much with augmented rows, which take long to make.
    probed = replace(system, sections={name: value for name, value in system.sections.items() if name != "augment"})
    known: dict[str, float] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    steps = {}
    for phase, share in system.shares.items():
        key = f"{cell.task.name}/{cell.system}/{cell.size}/{phase}"
        if key not in known:
            seconds = []
            for count in PROBE_STEPS:
                config = _config(
                    replace(cell, recipe=probed), work, scratch / f"{phase}-{count}", {phase: count}, validations=1
                )
                with _opened(config) as run:
                    due = prepare(run, only=["task"])
                    began = time.process_time()
                    run_stages(run, due)
                    seconds.append(time.process_time() - began)
            known[key] = max(1e-3, (seconds[1] - seconds[0]) / (PROBE_STEPS[1] - PROBE_STEPS[0]))
            write_json(kept, known)
        steps[phase] = max(VALIDATIONS, round(cell.seconds * share / known[key]))
    return steps


def _textbrewer(cell: Cell, work: Path, scratch: Path) -> dict[str, Any]:
    """Its two distillers in turn for their shares of the budget, on the pipeline's batches; the rate falls from round
    to round, and the round that is best on validation rows is kept."""
    with _opened(_config(cell, work, scratch / "run", {})) as run:
        prepare(run, only=["task"])
        teacher = run.load_task_teacher()
        width = teacher.config.hidden_size
        student = build_student(run.student_config(), run.task, run.config.student, width, cell.seed).model
        options = TrainingOptions(batch_size=BATCH_SIZE)
        rows = run.encoded.batches(run.encoded.features["train"], options)
        clock = time.monotonic(), time.process_time()
        spent, first = 0.0, 0
        trained: dict[str, int] = {}
        best: tuple[float, dict[str, torch.Tensor]] | None = None
        for phase, share in (("intermediate", INTERMEDIATE_SHARE), ("logits", 1 - INTERMEDIATE_SHARE)):
            brewer = TextBrewer(
                student,
                teacher,
                run.layer_map.attention if phase == "intermediate" else None,
                TEXTBREWER_RATE,
                temperature=1.0 if cell.task.type == "regression" else TEXTBREWER_TEMPERATURE,
                kd_loss="mse" if cell.task.type == "regression" else "ce",
            )
            stream = _plain(rows, first)
            took = 0.0
            count = 0
            while took < cell.seconds * share:
                left = 1 - took / (cell.seconds * share)
                for group in brewer.optimizer.param_groups:
                    group["lr"] = TEXTBREWER_RATE * left
                batches = [next(stream) for _ in range(8 if not count else _round(cell.seconds * share, took, count))]
                student.train()
                began = time.process_time()
                brewer.train(batches)
                took += time.process_time() - began
                count += len(batches)
                if phase == "logits":
                    value = run.encoded.figures(student.eval(), "validation")[run.metric]
                    if best is None or value >= best[0]:
                        best = value, {name: tensor.clone() for name, tensor in student.state_dict().items()}
            trained[phase] = count
            spent, first = spent + took, first + count
        assert best is not None
        student.load_state_dict(best[1])
        return {
            **_figures(run, student.eval(), run.encoded),
            "precision": "fp32",
            "steps": trained,
            "training_seconds": spent,
            "wall_seconds": time.monotonic() - clock[0],
            "cpu_seconds": time.process_time() - clock[1],
        }


def _round(budget: float, took: float, count: int) -> int:
    """Batches of the next round: an eighth of the budget, or what is left of it."""
    return max(1, round(min(budget / TEXTBREWER_ROUNDS, budget - took) * count / took))


def _plain(rows: Any, first: int) -> Iterator[dict[str, torch.Tensor]]:
    names = ("input_ids", "attention_mask", "token_type_ids")
    for micro_batches in rows.steps(first, 10**9):
        for batch in micro_batches:
            yield {name: batch[name] for name in names if name in batch}
