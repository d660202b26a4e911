"""One class per task type: its columns, its labels, its head, its encoding and what a prediction is.
Loading files is left to data.py, checking their rows to rows.py, the figures to evaluation.py.

Whatever a user's file calls its columns, a `Dataset` of this project has the canonical ones:
    sentences   text, text_pair (optional), label
    tokens      tokens, tags
    questions   question, context, answers {text: [...], answer_start: [...]}
Encoded, every row (every window of a context, for questions) has input_ids, token_type_ids where the tokenizer makes
them, labels, length, and row, the number of the canonical row it came from; tokens also have words, the number of the
word that each labelled piece begins, and windows starts and ends, where each piece of the context stands in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from datasets import ClassLabel, Dataset, List
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerBase,
)

from distill.losses import IGNORED, Logits
from distill.settings import UserError
from distill.spans import spans

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
        return _present(wanted, available)

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
        return _class_index(value, names)

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
        chosen = {_class_index(item, names) for item in value}
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


class TokenClassification(TaskType):
    """Tags belong to words; the first piece of a word carries the word's tag, the others IGNORED."""

    name = "token_classification"
    auto_class = AutoModelForTokenClassification
    logits = Logits.TOKEN_CLASSES
    metric = "entities"
    primary = "f1"
    others = ("precision", "recall", "accuracy")

    def columns(self, columns: Columns, available: Sequence[str]) -> dict[str, str]:
        return _present({"tokens": columns.text or "tokens", "tags": columns.label or "tags"}, available)

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
        return [_class_index(item, names) for item in value]

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


class QuestionAnswering(TaskType):
    """Extractive: a context longer than max_length is cut into windows that overlap by a quarter; the answer of a row
    is the best span over its windows. A window without the answer points at the first token, as does no answer.
    A question is cut to half of max_length."""

    name = "question_answering"
    auto_class = AutoModelForQuestionAnswering
    logits = Logits.SPAN
    metric = "spans"
    primary = "f1"
    others = ("exact_match",)
    has_names = False

    def columns(self, columns: Columns, available: Sequence[str]) -> dict[str, str]:
        wanted = {
            "question": columns.text or "question",
            "context": columns.text_pair or "context",
            "answers": columns.label or "answers",
        }
        return _present(wanted, available)

    def label_names(self, values: Sequence[Any], feature: Any) -> list[str]:
        return []

    def read_label(self, value: Any, names: Sequence[str]) -> dict[str, list[Any]]:
        if not isinstance(value, Mapping) or not {"text", "answer_start"} <= set(value):
            raise ValueError(f"{value!r} has no text and answer_start")
        texts, starts = value["text"], value["answer_start"]
        if not isinstance(texts, list) or not isinstance(starts, list):
            raise ValueError(f"{value!r} has no lists of texts and answer_starts")
        if len(texts) != len(starts):
            raise ValueError("text and answer_start differ in number")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{value!r} has an answer that is not a text")
        if not all(isinstance(start, int | float) and float(start).is_integer() for start in starts):
            raise ValueError(f"{value!r} has an answer that begins at no whole number")
        return {"text": texts, "answer_start": [int(start) for start in starts]}

    def is_withheld(self, label: Any) -> bool:
        return False

    def no_label(self, names: Sequence[str], words: int) -> dict[str, list[Any]]:
        return {"text": [], "answer_start": []}

    def num_labels(self, names: Sequence[str]) -> int:
        return 2

    def encode(self, rows: Rows, first_row: int, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Rows:
        encoded = tokenizer(
            [_first_pieces(question.strip(), tokenizer, max_length // 2) for question in rows["question"]],
            rows["context"],
            truncation="only_second",
            max_length=max_length,
            stride=max_length // 4,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        features: dict[str, list[Any]] = {
            name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded
        }
        features.update(labels=[], length=[], row=[], starts=[], ends=[])
        for window, offsets in enumerate(encoded["offset_mapping"]):
            local = encoded["overflow_to_sample_mapping"][window]
            inside = [part == 1 for part in encoded.sequence_ids(window)]
            starts = [start if context else -1 for (start, _), context in zip(offsets, inside, strict=True)]
            ends = [end if context else -1 for (_, end), context in zip(offsets, inside, strict=True)]
            features["labels"].append(_span_tokens(rows["answers"][local], starts, ends))
            features["length"].append(len(offsets))
            features["row"].append(first_row + local)
            features["starts"].append(starts)
            features["ends"].append(ends)
        return features

    def decode(
        self, logits: Sequence[np.ndarray], features: Dataset, rows: Dataset, names: Sequence[str]
    ) -> tuple[list[Any], list[Any]]:
        best: dict[int, tuple[float, str]] = {}
        no_answer: dict[int, float] = {}
        contexts, all_answers = rows["context"], rows["answers"]
        answers = {int(row): all_answers[int(row)] for row in features["row"]}
        for window, row, starts, ends in zip(
            logits, features["row"], features["starts"], features["ends"], strict=True
        ):
            no_answer[row] = min(no_answer.get(row, np.inf), float(window[0].sum()))
            for score, first, last in spans(np.asarray(window), starts):
                if score > best.get(row, (-np.inf, ""))[0]:
                    best[row] = (score, contexts[int(row)][starts[first] : ends[last]])
        # No answer can only be right where the set has such rows; elsewhere the best span is always taken.
        may_be_empty = any(not answer["text"] for answer in answers.values())
        predictions, references = [], []
        for row in sorted(answers):
            score, text = best.get(row, (-np.inf, ""))
            predictions.append("" if may_be_empty and no_answer[row] > score else text)
            references.append(list(answers[row]["text"]) or [""])
        return predictions, references


TASKS: dict[str, TaskType] = {
    task.name: task() for task in (SingleLabel, MultiLabel, Regression, TokenClassification, QuestionAnswering)
}


def config_key(canonical: str) -> str:
    """The setting that names a canonical column."""
    names = {"tokens": "data.text", "tags": "data.label", "label": "data.label", "answers": "data.label"}
    return names.get(canonical, "data.text_pair" if canonical in ("text_pair", "context") else "data.text")


def _class_index(value: Any, names: Sequence[str]) -> int:
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


def _present(wanted: dict[str, str], available: Sequence[str]) -> dict[str, str]:
    for canonical, own in wanted.items():
        if own not in available:
            raise UserError(
                f"{config_key(canonical)}: there is no column {own!r}; the data has {', '.join(available)}. "
                f"Set {config_key(canonical)} to one of them."
            )
    return wanted


def _first_pieces(text: str, tokenizer: PreTrainedTokenizerBase, count: int) -> str:
    """The text up to its count-th word piece."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text if len(offsets) <= count else text[: offsets[count - 1][1]]


def _span_tokens(answers: Mapping[str, list[Any]], starts: Sequence[int], ends: Sequence[int]) -> list[int]:
    """First and last token of the first answer in this window, [0, 0] where it is not whole inside."""
    if not answers["text"]:
        return [0, 0]
    begin = answers["answer_start"][0]
    end = begin + len(answers["text"][0])
    inside = [index for index, start in enumerate(starts) if start >= 0 and start < end and ends[index] > begin]
    if not inside or starts[inside[0]] > begin or ends[inside[-1]] < end:
        return [0, 0]
    return [inside[0], inside[-1]]
