"""Tasks that put labels or a number on a whole text or pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, List

from distill.losses import Logits
from distill.tasks.task_type import WITHHELD, TaskType, class_index


class SingleLabel(TaskType):
    name = "single_label_classification"
    problem_type = "single_label_classification"
    logits = Logits.CLASSES
    metric = "classification"
    primary = "accuracy"
    others = ("f1_macro",)

    def deciding_figures(self, names: Sequence[str]) -> tuple[str, ...]:
        return (*super().deciding_figures(names), *(("f1", "matthews") if len(names) == 2 else ()))


class MultiLabel(TaskType):
    name = "multi_label_classification"
    problem_type = "multi_label_classification"
    logits = Logits.BINARIES
    metric = "multi_label"
    primary = "f1_micro"
    others = ("f1_macro", "accuracy")

    def label_names(self, values: Sequence[Any], feature: Any) -> list[str]:
        inner = feature.feature if isinstance(feature, List) else None
        return super().label_names([item for value in values for item in value], inner)

    def check_form(self, value: Any) -> None:
        if not isinstance(value, list):
            raise ValueError(f"{value!r} is not a list of labels")
        for item in value:
            super().check_form(item)

    def read_label(self, value: Any, names: Sequence[str]) -> list[float]:
        self.check_form(value)
        chosen = {class_index(item, names) for item in value}
        return [float(index in chosen) for index in range(len(names))]

    def no_label(self, names: Sequence[str], words: int) -> list[float]:
        return [0.0] * len(names)

    def pad_labels(self, labels: list[Any], length: int) -> np.ndarray:
        return np.asarray(labels, dtype=np.float32)

    def decode(
        self, logits: Sequence[np.ndarray], features: Dataset, rows: Dataset, names: Sequence[str]
    ) -> tuple[list[Any], list[Any]]:
        # A probability of one half is a logit of zero.
        predictions = [(np.asarray(row) > 0).astype(int).tolist() for row in logits]
        return predictions, [[int(value) for value in row] for row in features["labels"]]


class Regression(TaskType):
    name = "regression"
    problem_type = "regression"
    logits = Logits.VALUE
    metric = "regression"
    primary = "pearson"
    others = ("spearman",)
    has_names = False

    def label_names(self, values: Sequence[Any], feature: Any) -> list[str]:
        return []

    def read_label(self, value: Any, names: Sequence[str]) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
            raise ValueError(f"{value!r} is not a number")
        if abs(value) > float(np.finfo(np.float32).max):
            raise ValueError(f"{value!r} is too large for float32")
        return float(value)

    def is_withheld(self, label: Any) -> bool:
        return bool(label == float(WITHHELD))

    def num_labels(self, names: Sequence[str]) -> int:
        return 1

    def pad_labels(self, labels: list[Any], length: int) -> np.ndarray:
        return np.asarray(labels, dtype=np.float32)

    def decode(
        self, logits: Sequence[np.ndarray], features: Dataset, rows: Dataset, names: Sequence[str]
    ) -> tuple[list[Any], list[Any]]:
        return [float(np.asarray(row).reshape(())) for row in logits], list(features["labels"])
