"""The task that finds answers in contexts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoModelForQuestionAnswering, PreTrainedTokenizerBase

from distill.losses import Logits
from distill.spans import spans
from distill.tasks.task_type import Columns, Rows, TaskType, present_columns


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
        return present_columns(wanted, available)

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
