"""The task that classifies words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, List
from transformers import AutoModelForTokenClassification, PreTrainedTokenizerBase

from distill.losses import IGNORED, Logits
from distill.tasks.task_type import WITHHELD, Columns, Rows, TaskType, class_index, present_columns


class TokenClassification(TaskType):
    """Tags belong to words; the first piece of a word carries the word's tag, the others IGNORED."""

    name = "token_classification"
    auto_class = AutoModelForTokenClassification
    logits = Logits.TOKEN_CLASSES
    metric = "entities"
    primary = "f1"
    others = ("precision", "recall", "accuracy")

    def columns(self, columns: Columns, available: Sequence[str]) -> dict[str, str]:
        return present_columns({"tokens": columns.text or "tokens", "tags": columns.label or "tags"}, available)

    def label_names(self, values: Sequence[Any], feature: Any) -> list[str]:
        inner = feature.feature if isinstance(feature, List) else None
        return super().label_names([item for value in values for item in value], inner)

    def check_form(self, value: Any) -> None:
        if not isinstance(value, list):
            raise ValueError(f"{value!r} is not a list of tags")
        for item in value:
            super().check_form(item)

    def read_label(self, value: Any, names: Sequence[str]) -> list[int]:
        self.check_form(value)
        return [class_index(item, names) for item in value]

    def is_withheld(self, label: Any) -> bool:
        return isinstance(label, list) and bool(label) and all(item == WITHHELD for item in label)

    def no_label(self, names: Sequence[str], words: int) -> list[int]:
        return [0] * words

    def encode(self, rows: Rows, first_row: int, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Rows:
        encoded = tokenizer(
            rows["tokens"],
            is_split_into_words=True,
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
        )
        features = {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}
        features.update(labels=[], words=[])
        for index, tags in enumerate(rows["tags"]):
            words = encoded.word_ids(index)
            starts = [word is not None and (at == 0 or words[at - 1] != word) for at, word in enumerate(words)]
            features["labels"].append(
                [tags[word] if start else IGNORED for word, start in zip(words, starts, strict=True)]
            )
            features["words"].append([word for word, start in zip(words, starts, strict=True) if start])
        features["length"] = [len(ids) for ids in features["input_ids"]]
        features["row"] = list(range(first_row, first_row + len(rows["tokens"])))
        return features

    def pad_labels(self, labels: list[Any], length: int) -> np.ndarray:
        padded = np.full((len(labels), length), IGNORED, dtype=np.int64)
        for row, values in zip(padded, labels, strict=True):
            row[: len(values)] = values
        return padded

    def decode(
        self, logits: Sequence[np.ndarray], features: Dataset, rows: Dataset, names: Sequence[str]
    ) -> tuple[list[Any], list[Any]]:
        outside = names.index("O") if "O" in names else 0
        predictions, references = [], []
        for row_logits, labels, words, row in zip(
            logits, features["labels"], features["words"], features["row"], strict=True
        ):
            tags = rows[int(row)]["tags"]
            # Words past max_length, and those without a piece, were never seen by the model: tagged outside.
            predicted = [outside] * len(tags)
            first_pieces = [index for index, label in enumerate(labels) if label != IGNORED]
            for index, word in zip(first_pieces, words, strict=True):
                predicted[word] = int(np.argmax(row_logits[index]))
            predictions.append([names[index] for index in predicted])
            references.append([names[index] for index in tags])
        return predictions, references
