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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.quality_systems import INTERMEDIATE_SHARE, Peer, System
from benchmarks.quality_tasks import (
    SIZES,
    TEACHER,
    Task,
    runtime,
    teacher_config,
    write_splits,
)
from benchmarks.quality_texts import texts_file, write_texts
from benchmarks.run_file import locked
from benchmarks.textbrewer import TextBrewer
from distill.checkpoint import write_json
from distill.config import Config, parse_config
from distill.data import Placement
from distill.settings import UserError
from distill.students import build_student
from distill.training import TrainingOptions
from pipelines.encoded import Encoded
from pipelines.general import initialize
from pipelines.machine import machine
from pipelines.pipeline import prepare, run_stages
from pipelines.run import Run, close_run, open_run

BATCH_SIZE = 32
VALIDATIONS = {"intermediate": 1, "logits": 4}
"""Of a phase; its best weights are kept. On layers a validation runs both models over all the rows, and eight of them
took longer than the training."""
PROBE_STEPS, READ_EVERY = 32, 4
"""A step's cost is that of the fastest reading, which was disturbed least; in each so many steps are timed together."""
FIRST_WEIGHTS, TEACHER_PASS, AUGMENTATION = "first weights", "teacher once", "augmentation"
"""What is paid out of the budget before the first step."""
STATES_GB = 20
TEXTBREWER_ROUNDS = 8
TEXTBREWER_SHARES = {"intermediate": INTERMEDIATE_SHARE, "logits": 1 - INTERMEDIATE_SHARE}
TEXTBREWER_RATE, TEXTBREWER_TEMPERATURE = 1e-4, 8.0
"""Of TextBrewer's own examples with TinyBERT's shape."""


@dataclass(frozen=True)
class Cell:
    """What one run measures; recipe: what the system named is."""

    task: Task
    system: str
    recipe: System | Peer
    size: str
    seed: int
    seconds: float
    """Of processor time on one thread that its training steps may take."""
    costs_like: str | None = None
    """Another system whose steps cost as much, where one is known; its cost is taken."""

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
    """Fine-tune the task's teacher, or go on with it; its figures. It lies in work/teachers, both are made once."""
    kept = work / "teachers" / task.name / "figures.json"
    if kept.is_file():
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    make_teacher(task, data, work)
    with _opened(teacher_config(task, work)) as run:
        result = _result(run.folder, "teacher")
        found = {
            **_figures(run, run.load_task_teacher(), run.teacher_encoded),
            "training_seconds": result["seconds"],
        }
    write_json(kept, found)
    return found


def make_teacher(task: Task, data: Path, work: Path) -> None:
    """Fine-tune the task's teacher, unless it was."""
    write_splits(task, data, work / "rows" / task.name)
    if not (work / "teachers" / task.name / "teacher" / "result.json").is_file():
        with _opened(teacher_config(task, work)) as run:
            run_stages(run, prepare(run, only=["teacher"]))


def measure(cell: Cell, data: Path, work: Path, costs: Path, *, reported: str = "test") -> dict[str, Any]:
    """Train the cell's student for its budget, its teacher before it where there is none; its figures, on no other rows
    than those that chose the weights where `reported` is validation.

    Args:
        costs: JSON of seconds of a step by task, system, size and phase. What it holds is taken, what it lacks is
            measured once and written there: a cell has the same number of steps whenever and wherever it is run.
    """
    make_teacher(cell.task, data, work)
    if isinstance(cell.recipe, System) and (texts := cell.recipe.unlabelled_of(cell.task)):
        write_texts(texts, data, work)
    if isinstance(cell.recipe, System) and cell.recipe.general_steps:
        task = cell.task if cell.recipe.taught_by_task else None
        first = str(general_student(cell.recipe.general_steps, cell.size, data, work, task))
        student = {**cell.recipe.student, "initialization": first}
        cell = replace(cell, recipe=replace(cell.recipe, student=student))
    with tempfile.TemporaryDirectory(prefix="probe-", dir=work) as scratch:
        steps = _steps(cell, work, costs, Path(scratch))
        if isinstance(cell.recipe, Peer):
            return _textbrewer(cell, work, Path(scratch), steps)
    # Beside other cells' folders: a stopped cell goes on from its checkpoint.
    folder = work / "runs" / "-".join(str(value) for value in cell.key.values())
    with _opened(_config(cell, work, folder, steps, work / "answers" / cell.task.name)) as run:
        clock = time.monotonic(), time.process_time()
        run_stages(run, prepare(run, only=_stages(run.config)))
        seconds = time.monotonic() - clock[0], time.process_time() - clock[1]
        result = _result(folder, "task")
        student = run.task.auto_class.from_pretrained(folder / "task" / "student")
        figures = {
            **_figures(run, student, run.encoded, reported),
            "steps": steps,
            "first_weights_seconds": result["first_weights_seconds"],
            "training_seconds": sum(phase["seconds"] for phase in result["phases"].values()),
            "wall_seconds": seconds[0],
            "cpu_seconds": seconds[1],
        }
        if "vocabulary" in result:
            figures["vocabulary"] = result["vocabulary"]
    shutil.rmtree(folder)
    return figures


def general_student(steps: int, size: str, data: Path, work: Path, task: Task | None = None) -> Path:
    """A student after general distillation on the books for so many steps of 2,048 word pieces, cut out of the packaged
    teacher, or of the task's, and taught by it: a folder that student.initialization takes. It has all the teacher's
    pieces, out of which a task's vocabulary is cut later. It lies in work/general and is made once.

    Raises:
        UserError: there are no books under `data`.
    """
    files = sorted((data / "books").glob("train.*.txt.gz"))
    if not files:
        raise UserError(f"--data: {data} holds no books/train.*.txt.gz. Give the folder that holds books/.")
    folder = work / "general" / (f"{size}-{steps}" if task is None else f"{size}-{steps}-{task.name}")
    student = folder / "general" / "student"
    if (folder / "general" / "result.json").is_file():
        return student
    config = parse_config(
        {
            "output": str(folder),
            "teacher": {"model": TEACHER if task is None else str(_teacher_folder(task, work))},
            "student": {**SIZES[size].student(), "vocabulary": None},
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


def _teacher_folder(task: Task, work: Path) -> Path:
    return work / "teachers" / task.name / "teacher" / "model"


@contextmanager
def _opened(config: Config) -> Iterator[Run]:
    run = open_run(config)
    try:
        yield run
    finally:
        close_run(run)


def _stages(config: Config) -> list[str]:
    """What a student takes beside its teacher."""
    return ["augment", "task"] if config.augment else ["task"]


def _result(folder: Path, stage: str) -> dict[str, Any]:
    """What a finished stage said of itself; nothing where it did not run."""
    file = folder / stage / "result.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


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


def _config(cell: Cell, work: Path, folder: Path, steps: Mapping[str, int], answers: Path) -> Config:
    """answers: where the teacher's logits and states lie, if rows come often enough to keep them."""
    system, size = cell.recipe, SIZES[cell.size]
    if isinstance(system, Peer):
        # Whose phases are its own; the pipeline is asked for rows and for the first student.
        phase = {"batch_size": BATCH_SIZE}
        system = System("default", {"logits": phase}, {}, {}, {"initialization": system.initialization})
        phases: dict[str, Any] = {"intermediate": None, "logits": phase}
    else:
        phases = dict.fromkeys(("intermediate", "logits"))
        rate = {"learning_rate": system.rates[cell.size]} if cell.size in system.rates else {}
        for name, count in steps.items():
            phases[name] = {
                "batch_size": BATCH_SIZE,
                "measure_gradients_every_steps": 10 * count,
                **system.phases[name],
                **rate,
                "max_steps": count,
                "evaluate_every_steps": max(1, count // VALIDATIONS[name]),
                "save_every_steps": max(200, count),
            }
    augment = system.augment_of(cell.task)
    texts = system.unlabelled_of(cell.task)
    more = {"path": "text", "data_files": str(texts_file(texts, work))} if texts else None
    return parse_config(
        {
            "preset": system.preset,
            "output": str(folder),
            "seed": cell.seed,
            "teacher": {"model": str(_teacher_folder(cell.task, work))},
            "student": {**size.student(), **system.student},
            "data": cell.task.data(work / "rows" / cell.task.name),
            "task": {
                "type": cell.task.type,
                "metric": cell.task.metric,
                "losses": system.losses,
                "unlabelled": more,
                **system.task,
                **phases,
            },
            "evaluate": {"undistilled": False},
            "augment": augment,
            "runtime": {
                **runtime(),
                **(
                    {"logits_cache": str(answers), "states_cache_gb": STATES_GB}
                    if system.keeps_answers_of(cell.task)
                    else {}
                ),
            },
            **system.sections,
        }
    )


def _steps(cell: Cell, work: Path, costs: Path, scratch: Path) -> dict[str, int]:
    """Steps of each phase that its share of the budget pays, less what comes before the first one."""
    shares = cell.recipe.shares if isinstance(cell.recipe, System) else TEXTBREWER_SHARES
    kind = f"{cell.task.name}/{cell.costs_like or cell.system}/{cell.size}"
    known = _read_costs(costs).get(kind, {})
    if not shares.keys() <= known.keys():
        known = _costs(cell, work, scratch)
        with locked(costs):
            write_json(costs, {**_read_costs(costs), kind: known})
    seconds = cell.seconds - sum(known[name] for name in (FIRST_WEIGHTS, TEACHER_PASS, AUGMENTATION))
    return {phase: max(TEXTBREWER_ROUNDS, round(seconds * share / known[phase])) for phase, share in shares.items()}


def _read_costs(file: Path) -> dict[str, dict[str, float]]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _costs(cell: Cell, work: Path, scratch: Path) -> dict[str, float]:
    """Seconds of a step by phase, of making the first weights, of asking the teacher about the rows once, and of making
    the augmented ones."""
    if isinstance(cell.recipe, Peer):
        return _peer_costs(cell, work, scratch)
    phases = {name: {**options, "log_every_steps": READ_EVERY} for name, options in cell.recipe.phases.items()}
    probed = replace(cell, recipe=replace(cell.recipe, phases=phases))
    folder = scratch / "probe"
    probe_steps = dict.fromkeys(cell.recipe.shares, PROBE_STEPS)
    with _opened(_config(probed, work, folder, probe_steps, scratch / "answers")) as run:
        clock = time.monotonic(), time.process_time()
        run_stages(run, prepare(run, only=_stages(run.config)))
        seconds = time.monotonic() - clock[0], time.process_time() - clock[1]
    # Of a core that others wanted too; the readings of steps are short enough for one of them to have had it alone.
    share = min(1.0, seconds[1] / seconds[0])
    result, augmented = (_result(folder, stage) for stage in ("task", "augment"))
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    costs = {
        FIRST_WEIGHTS: share * result["first_weights_seconds"],
        TEACHER_PASS: share * sum(phase["teacher_seconds"] for phase in result["phases"].values()),
        AUGMENTATION: share * augmented.get("seconds", 0.0),
    }
    for phase in cell.recipe.shares:
        speeds = [
            row["train/tokens_per_second"]
            for row in logged
            if row["stage"] == f"task.{phase}" and "train/tokens_per_second" in row
        ]
        costs[phase] = result["phases"][phase]["tokens"] / PROBE_STEPS / max(speeds)
    return costs


def _peer_costs(cell: Cell, work: Path, scratch: Path) -> dict[str, float]:
    costs = dict.fromkeys((FIRST_WEIGHTS, TEACHER_PASS, AUGMENTATION), 0.0)
    with _opened(_config(cell, work, scratch / "probe", {}, scratch / "answers")) as run:
        prepare(run, only=["task"])
        teacher = run.load_task_teacher()
        began = time.monotonic()
        student = _first_student(cell, run, teacher)
        costs[FIRST_WEIGHTS] = time.monotonic() - began
        batches = _plain(run)
        for phase in TEXTBREWER_SHARES:
            brewer, seconds = _brewer(cell, run, phase, student), []
            for _ in range(PROBE_STEPS // READ_EVERY):
                own = [next(batches) for _ in range(READ_EVERY)]
                began = time.monotonic()
                brewer.train(own)
                seconds.append((time.monotonic() - began) / READ_EVERY)
            costs[phase] = min(seconds)
    return costs


def _textbrewer(cell: Cell, work: Path, scratch: Path, steps: Mapping[str, int]) -> dict[str, Any]:
    """Its two distillers in turn, on the pipeline's batches; the rate falls from round to round, and the round that is
    best on validation rows is kept."""
    with _opened(_config(cell, work, scratch / "run", {}, scratch / "answers")) as run:
        prepare(run, only=["task"])
        student = _first_student(cell, run, run.load_task_teacher())
        clock = time.monotonic(), time.process_time()
        spent, batches = 0.0, _plain(run)
        best: tuple[float, dict[str, torch.Tensor]] | None = None
        for phase, count in steps.items():
            brewer = _brewer(cell, run, phase, student)
            for done in range(TEXTBREWER_ROUNDS):
                for group in brewer.optimizer.param_groups:
                    group["lr"] = TEXTBREWER_RATE * (1 - done / TEXTBREWER_ROUNDS)
                size = count * (done + 1) // TEXTBREWER_ROUNDS - count * done // TEXTBREWER_ROUNDS
                own = [next(batches) for _ in range(size)]
                student.train()
                began = time.process_time()
                brewer.train(own)
                spent += time.process_time() - began
                if phase == "logits":
                    value = run.encoded.figures(student.eval(), "validation")[run.metric]
                    if best is None or value >= best[0]:
                        best = value, {name: tensor.clone() for name, tensor in student.state_dict().items()}
        assert best is not None
        student.load_state_dict(best[1])
        return {
            **_figures(run, student.eval(), run.encoded),
            "precision": "fp32",
            "steps": dict(steps),
            "training_seconds": spent,
            "wall_seconds": time.monotonic() - clock[0],
            "cpu_seconds": time.process_time() - clock[1],
        }


def _first_student(cell: Cell, run: Run, teacher: PreTrainedModel) -> PreTrainedModel:
    student = build_student(run.student_config(), run.task, run.config.student, teacher.config.hidden_size, cell.seed)
    options = TrainingOptions(batch_size=BATCH_SIZE)
    rows = run.encoded.batches(run.encoded.features["train"], options, placement=Placement())
    initialize(run, student, teacher, rows)
    return student.model


def _brewer(cell: Cell, run: Run, phase: str, student: PreTrainedModel) -> TextBrewer:
    of_numbers = cell.task.type == "regression"
    return TextBrewer(
        student,
        run.load_task_teacher(),
        run.layer_map.attention if phase == "intermediate" else None,
        TEXTBREWER_RATE,
        temperature=1.0 if of_numbers else TEXTBREWER_TEMPERATURE,
        kd_loss="mse" if of_numbers else "ce",
    )


def _plain(run: Run) -> Iterator[dict[str, torch.Tensor]]:
    """The pipeline's batches as plain models take them."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    rows = run.encoded.batches(run.encoded.features["train"], TrainingOptions(batch_size=BATCH_SIZE))
    for micro_batches in rows.steps(0, 10**9):
        for batch in micro_batches:
            yield {name: batch[name] for name in names if name in batch}
