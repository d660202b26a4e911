"""What every task type has: columns, labels, head, encoding, and what a prediction is.
What differs is left to the classes beside: texts.py, tokens.py, questions.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from datasets import ClassLabel, Dataset
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from distill.losses import Logits
from distill.settings import UserError

WITHHELD = -1
"""The label of a row whose true label is not published (GLUE's test splits)."""

Rows = Mapping[str, list[Any]]


@dataclass(frozen=True)
class Columns:
    """A user's column names, as given in `data.*`; None where the task's default holds."""

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None


class TaskType:
    """What the pipeline must know of a task. Stateless: label names travel as arguments."""

    name: ClassVar[str]
    auto_class: ClassVar[Any] = AutoModelForSequenceClassification
    problem_type: ClassVar[str | None] = None
    logits: ClassVar[Logits]
    metric: ClassVar[str]
    """Name of the metric group in evaluation.py."""
    primary: ClassVar[str]
    """The figure by which checkpoints are chosen and retention is told; higher is better."""
    others: ClassVar[tuple[str, ...]] = ()
    """Further figures that may decide; higher is better."""
    has_names: ClassVar[bool] = True
    """Whether labels have names (id2label)."""

    def deciding_figures(self, names: Sequence[str]) -> tuple[str, ...]:
        """What task.metric may be."""
        return (self.primary, *self.others)

    def columns(self, columns: Columns, available: Sequence[str]) -> dict[str, str]:
        """Canonical column -> the user's column. Raises UserError for a column that is not there."""
        wanted = {"text": columns.text or "text", "label": columns.label or "label"}
        if columns.text_pair is not None:
            wanted["text_pair"] = columns.text_pair
        return present_columns(wanted, available)

    def label_names(self, values: Sequence[Any], feature: Any) -> list[str]:
        """The names found in the training split's label column."""
        if isinstance(feature, ClassLabel):
            return list(feature.names)
        whole = (int(value) if isinstance(value, float) and value.is_integer() else value for value in values)
        present = sorted({value for value in whole if value is not None and value != WITHHELD}, key=_by_value)
        if present and all(isinstance(value, int) and not isinstance(value, bool) for value in present):
            return [str(index) for index in range(max(present) + 1)]
        return [str(value) for value in present]

    def check_form(self, value: Any) -> None:
        """Raises ValueError for a label that is none of this task, whatever the names; of tasks that have names."""
        if isinstance(value, list | dict):
            raise ValueError(f"{value!r} is no single label; task.type may be another")
        if isinstance(value, float) and np.isnan(value):
            raise ValueError("the label is missing")
        if isinstance(value, float) and not value.is_integer():
            raise ValueError(f"{value!r} is no class; task.type may be regression")

    def read_label(self, value: Any, names: Sequence[str]) -> Any:
        """A user's label as the canonical one. Raises ValueError saying what is wrong with it."""
        return class_index(value, names)

    def is_withheld(self, label: Any) -> bool:
        return isinstance(label, int) and label == WITHHELD

    def no_label(self, names: Sequence[str], words: int) -> Any:
        """What stands for the label of a row that has none, of so many words where words are classified. It fits every
        type that the column may have; no loss may read it."""
        return 0

    def num_labels(self, names: Sequence[str]) -> int:
        return len(names)

    def encode(self, rows: Rows, first_row: int, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Rows:
        """Tokenise canonical rows; `first_row` is the number of the first one."""
        encoded = tokenizer(
            rows["text"], rows.get("text_pair"), truncation=True, max_length=max_length, return_attention_mask=False
        )
        count = len(rows["text"])
        features = {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}
        features["labels"] = rows["label"]
        features["length"] = [len(ids) for ids in features["input_ids"]]
        features["row"] = list(range(first_row, first_row + count))
        return features

    def pad_labels(self, labels: list[Any], length: int) -> np.ndarray:
        """A batch's labels as one array; token labels are padded to `length`."""
        return np.asarray(labels, dtype=np.int64)

    def pad_logits(self, logits: list[Any], lengths: np.ndarray, length: int) -> np.ndarray:
        """A batch's logits, flat by row, as one array (B, C); those of tokens and spans (B, length, C), padded by 0."""
        if self.logits not in (Logits.TOKEN_CLASSES, Logits.SPAN):
            return np.asarray(logits, dtype=np.float32)
        padded = np.zeros((len(logits), length, len(logits[0]) // int(lengths[0])), dtype=np.float32)
        for row, values, count in zip(padded, logits, lengths, strict=True):
            row[:count] = np.asarray(values, dtype=np.float32).reshape(count, -1)
        return padded

    def decode(
        self, logits: Sequence[np.ndarray], features: Dataset, rows: Dataset, names: Sequence[str]
    ) -> tuple[list[Any], list[Any]]:
        """(predictions, references) for the metric; logits[i] belongs to features[i], padding cut off."""
        predictions = [int(np.argmax(row)) for row in logits]
        return predictions, list(features["labels"])


def config_key(canonical: str) -> str:
    """The setting that names a canonical column."""
    names = {"tokens": "data.text", "tags": "data.label", "label": "data.label", "answers": "data.label"}
    return names.get(canonical, "data.text_pair" if canonical in ("text_pair", "context") else "data.text")


def class_index(value: Any, names: Sequence[str]) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if 0 <= value < len(names):
            return value
        raise ValueError(f"label {value} is outside the {len(names)} names {_short(names)}")
    if str(value) in names:
        return list(names).index(str(value))
    raise ValueError(f"label {value!r} is not one of {_short(names)}")


def _short(names: Sequence[str]) -> str:
    shown = ", ".join(names[:10])
    return f"({shown}, ...)" if len(names) > 10 else f"({shown})"


def _by_value(value: Any) -> tuple[bool, Any]:
    return (isinstance(value, str), value)


def present_columns(wanted: dict[str, str], available: Sequence[str]) -> dict[str, str]:
    for canonical, own in wanted.items():
        if own not in available:
            raise UserError(
                f"{config_key(canonical)}: there is no column {own!r}; the data has {', '.join(available)}. "
                f"Set {config_key(canonical)} to one of them."
            )
    return wanted
