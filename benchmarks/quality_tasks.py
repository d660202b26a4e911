"""What benchmarks/quality.py measures on: seven tasks, their rows on disk, their teachers, the two student shapes.
Which systems learn from it, and when, is left to quality.py; what is made of the figures to quality_report.py."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from distill.checkpoint import write_text
from distill.config import Config, parse_config
from distill.settings import UserError
from pipelines.run import measured_precision

TEACHER = "all-minilm-l6-v2"
SPLIT_SEED = 42
"""Of the rows held out where a set has too few splits: the same for every system and seed."""
TEACHER_SEED = 42


@dataclass(frozen=True)
class Task:
    """A data set.

    columns: of the rows, as `data` names them. reported: the source's split that figures are reported on. held_out:
    training rows that choose checkpoints; 0 where the source's validation split does. teacher: fine-tuning of the
    teacher, as teacher.training takes it. keeps_answers: whether a student sees its rows more than once in the time it
    is given, so that the teacher is asked about all of them beforehand.
    """

    name: str
    columns: Mapping[str, str]
    reported: str
    teacher: Mapping[str, Any]
    type: str = "single_label_classification"
    metric: str = "accuracy"
    max_length: int = 64
    held_out: int = 0
    keeps_answers: bool = True

    @property
    def embedded(self) -> bool:
        return self.name == "bbc_news"

    def data(self, rows: Path) -> dict[str, Any]:
        """The config's section `data`, of rows written by `write_splits` into the folder `rows`."""
        if self.embedded:
            return {"path": self.name, "max_length": self.max_length}
        files = {split: str(rows / f"{split}.jsonl") for split in ("train", "validation", "test")}
        return {"path": "json", "data_files": files, **self.columns, "max_length": self.max_length}


SENTENCE = {"text": "sentence", "label": "label"}
PAIR = {"text": "sentence1", "text_pair": "sentence2", "label": "label"}
# fmt: off
TASKS: Mapping[str, Task] = {task.name: task for task in (
    Task("sst2", SENTENCE, "validation", {"epochs": 2, "batch_size": 64, "learning_rate": 1e-4,
                                          "evaluate_every_steps": 250}, held_out=2000,
         keeps_answers=False),
    Task("trec", SENTENCE, "test", {"epochs": 4, "learning_rate": 1e-4}, held_out=546, max_length=48),
    Task("mrpc", PAIR, "test", {"epochs": 5, "learning_rate": 1e-4}, max_length=128),
    Task("stsb", PAIR, "test", {"epochs": 4, "learning_rate": 1e-4}, type="regression", metric="pearson",
         max_length=128),
    Task("bbc_news", {}, "test", {"epochs": 3, "learning_rate": 1e-4}),
    Task("agnews", SENTENCE, "test", {"epochs": 2, "learning_rate": 1e-4}, held_out=1000, max_length=96,
         keeps_answers=False),
    Task("wnut17", {"text": "tokens", "label": "ner_tags"}, "test", {"epochs": 6, "learning_rate": 2e-4},
         type="token_classification", metric="f1"),
)}
# fmt: on


@dataclass(frozen=True)
class Size:
    """A student's shape; `changes` are further settings of the section student."""

    layers: int
    width: int
    heads: int
    intermediate_size: int
    changes: Mapping[str, Any] = field(default_factory=dict)

    def student(self) -> dict[str, Any]:
        shape = {name: getattr(self, name) for name in ("layers", "width", "heads", "intermediate_size")}
        return {**shape, "dropout": 0.0, **self.changes}


SIZES: Mapping[str, Size] = {
    "3L-312": Size(3, 312, 12, 1200),
    # 2.95 million parameters, 1/7.7 of the teacher's 22.7; docs/vocabulary.md says how it was chosen.
    "tiny": Size(3, 216, 12, 400, {"embedding_width": 80, "vocabulary": {"size": 22_000, "min_count": 0}}),
}


def write_splits(task: Task, data: Path, folder: Path) -> None:
    """train, validation and test of a task as JSON lines in `folder`, unless they are there; no row is in two.

    Raises:
        UserError: the set is not under `data`.
    """
    if task.embedded or (folder / "test.jsonl").is_file():
        return
    source = data / task.name
    if not (source / "train.jsonl.gz").is_file():
        raise UserError(f"--data: {source} holds no train.jsonl.gz. Give the folder that holds {task.name}/.")
    train, reported = _lines(source / "train.jsonl.gz"), _lines(source / f"{task.reported}.jsonl.gz")
    if task.held_out:
        order = random.Random(SPLIT_SEED).sample(range(len(train)), len(train))
        validation = [train[index] for index in sorted(order[: task.held_out])]
        train = [train[index] for index in sorted(order[task.held_out :])]
    else:
        validation = _lines(source / "validation.jsonl.gz")
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("validation", validation), ("test", reported)):
        write_text(folder / f"{name}.jsonl", "".join(rows))


def _lines(file: Path) -> Sequence[str]:
    """The rows, one JSON object a line, without columns that no task takes."""
    kept = {"sentence", "sentence1", "sentence2", "label", "tokens", "ner_tags"}
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    return [json.dumps({key: row[key] for key in row if key in kept}) + "\n" for row in rows]


@cache
def runtime() -> dict[str, Any]:
    """The config's section of that name: one thread, and the precision that is faster here, which a process can settle
    once."""
    device = PartialState(cpu=not torch.accelerator.is_available()).device
    return {"cpu_threads": 1, "precision": measured_precision(device)}


def teacher_config(task: Task, work: Path) -> Config:
    """The run that fine-tunes the task's teacher, in work/teachers; only its teacher stage is asked for."""
    return parse_config(
        {
            "output": str(work / "teachers" / task.name),
            "seed": TEACHER_SEED,
            "teacher": {"model": TEACHER, "training": dict(task.teacher)},
            "data": task.data(work / "rows" / task.name),
            "task": {"type": task.type, "metric": task.metric, "intermediate": None},
            "runtime": runtime(),
        }
    )
