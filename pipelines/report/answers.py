"""What a run's teacher and student say of its test rows, found by running both of them.
What is made of it is left to the files named after kinds of tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.special import expit, softmax
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from distill.data import Placement
from distill.evaluation import predict_share, score
from distill.losses import Logits
from distill.tasks import TaskType
from pipelines.encoded import Encoded
from pipelines.run import Run

ROWS_AT_ONCE = 512
"""Encoded rows between two steps of the progress bar."""


@dataclass(frozen=True)
class Answers:
    """One model's, in the order of the test rows."""

    features: Dataset
    """The rows as this model reads them; a long context is several of them."""
    logits: list[np.ndarray]
    """Of each encoded row, padding cut off."""
    predictions: list[Any]
    metrics: dict[str, float]


@dataclass(frozen=True)
class Test:
    """The test rows, and both models' answers."""

    rows: Dataset
    names: tuple[str, ...]
    task: TaskType
    metric: str
    references: list[Any]
    teacher: Answers
    student: Answers

    def __len__(self) -> int:
        return len(self.references)

    def sides(self) -> tuple[tuple[str, Answers], tuple[str, Answers]]:
        """Both models by name."""
        return ("teacher", self.teacher), ("student", self.student)


def ask_both(run: Run, teacher: PreTrainedModel, student: PreTrainedModel) -> Test:
    """Run teacher and student over the test split, float32, with a progress bar each."""
    rows = run.data.splits["test"]
    asked = _ask(run, run.teacher_encoded, teacher, "teacher")
    own = _ask(run, run.encoded, student, "student")
    references = run.task.decode(own.logits, own.features, rows, run.data.names)[1]
    return Test(rows, run.data.names, run.task, run.metric, references, asked, own)


def _ask(run: Run, encoded: Encoded, model: PreTrainedModel, who: str) -> Answers:
    rows, names = run.data.splits["test"], run.data.names
    features = encoded.encode(rows, "test")
    logits: list[np.ndarray] = []
    with tqdm(total=len(features), desc=f"{who} on test rows", unit="row", dynamic_ncols=True) as bar:
        for start in range(0, len(features), ROWS_AT_ONCE):
            part = features.select(range(start, min(start + ROWS_AT_ONCE, len(features))))
            found = predict_share(model, part, encoded.collator, run.config.evaluate.batch_size, Placement())
            logits += [row for _, row in sorted(found, key=lambda pair: pair[0])]
            bar.update(len(part))
    predictions, _ = run.task.decode(logits, features, rows, names)
    metrics = score(logits, features, rows, run.task, names)
    return Answers(features, logits, predictions, metrics)


def probabilities(logits: np.ndarray, kind: Logits) -> np.ndarray:
    """(..., C) -> (..., C), float64: a softmax over classes, a sigmoid where each label is on its own."""
    wide = np.asarray(logits, dtype=np.float64)
    return np.asarray(expit(wide) if kind is Logits.BINARIES else softmax(wide, axis=-1))
