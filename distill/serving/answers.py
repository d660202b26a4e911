"""Texts to answers with an artefact of `tinybert export`: pieces, batches by length, logits, labels.
Requests and their limits are left to protocol.py. Needs numpy, tokenizers and onnxruntime only, so that an image or a
SageMaker container need not carry the library that trains."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from distill.export.session import METADATA_FILE, MODEL_FILE, open_session
from distill.spans import spans

FORWARD_PIECES = 24
"""What another forward is taken to cost, in pieces, an estimate: rows are padded to one length where that is less."""

Row = tuple[str, str | None]
"""A text and, in tasks of pairs, the second one; question and context."""
Answer = dict[str, Any]
"""What is said of a row, by the names in OUTPUTS."""
Forward = Callable[[dict[str, np.ndarray]], np.ndarray]
"""(B, T) int64 inputs by name -> logits (B, C), of tokens (B, T, C), of spans' start and end (B, T, 2)."""

OUTPUTS: dict[str, tuple[str, ...]] = {
    "single_label_classification": ("logits", "probabilities", "label"),
    "multi_label_classification": ("logits", "probabilities", "label"),
    "regression": ("logits",),
    "token_classification": ("logits", "probabilities", "label"),
    "question_answering": ("label", "score", "start", "end"),
}
"""Of each task: logits and probabilities (C,), of words (W, C); label a name, a list of names (multi-label, words), the
answer; start and end the answer's characters in the context, score its probability in its window."""


@dataclass(frozen=True)
class Served:
    """What a model answers, as its metadata.json says."""

    task: str
    labels: tuple[str, ...]
    max_length: int
    pairs: bool | None = None
    """Whether a row is two texts; None where the export did not note it: both are taken."""

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Served:
        """Of a metadata.json's content."""
        pairs = True if metadata["task"] == "question_answering" else metadata.get("pairs")
        return cls(metadata["task"], tuple(metadata["labels"]), metadata["max_length"], pairs)


@dataclass
class Window:
    """One sequence for the model: a row, or a part of a long context."""

    row: int
    encoding: Encoding
    logits: np.ndarray = field(init=False)
    """(C,), or (T, C) of tokens and spans."""


class Answerer:
    """Answers rows of text. Not thread-safe: a tokenizer keeps how it truncates.

    Args:
        pad_id: the piece that fills up a batch.
        takes: the model's inputs by name.
    """

    def __init__(
        self, served: Served, tokenizer: Tokenizer, pad_id: int, takes: Sequence[str], forward: Forward
    ) -> None:
        self.served, self.pad_id, self.takes, self.forward = served, pad_id, takes, forward
        # As the task's own rows are cut (tasks/); a question is cut before, by a tokenizer that does not truncate.
        self._whole, self._cut = (Tokenizer.from_str(tokenizer.to_str()) for _ in range(2))
        for one in (self._whole, self._cut):
            one.no_padding()
        self._whole.no_truncation()
        if served.task == "question_answering":
            self._cut.enable_truncation(served.max_length, stride=served.max_length // 4, strategy="only_second")
        else:
            self._cut.enable_truncation(served.max_length)

    @classmethod
    def of_artefact(cls, folder: Path, threads: int) -> Answerer:
        """On ONNX Runtime; `threads` of one forward."""
        session = open_session(folder / MODEL_FILE, threads)
        config = read_json(folder / "config.json")

        def forward(inputs: dict[str, np.ndarray]) -> np.ndarray:
            found: list[np.ndarray] = session.run(None, inputs)
            return np.stack(found, axis=-1) if len(found) == 2 else found[0]

        return cls(
            Served.of(read_json(folder / METADATA_FILE)),
            Tokenizer.from_file(str(folder / "tokenizer.json")),
            config.get("pad_token_id") or 0,
            [given.name for given in session.get_inputs()],
            forward,
        )

    def answer(self, rows: Sequence[Row]) -> list[Answer]:
        """One answer for each row, in order; rows are grouped by length, whatever request they came with."""
        windows = self._windows(rows)
        for group in by_length([len(window.encoding) for window in windows]):
            self._forward([windows[index] for index in group])
        decode = getattr(self, f"_{self.served.task}")
        found = groupby(windows, key=lambda window: window.row)
        return [decode(rows[row], list(own)) for row, own in found]

    def _windows(self, rows: Sequence[Row]) -> list[Window]:
        task, most = self.served.task, self.served.max_length
        if task == "token_classification":
            words = [[match.group() for match in words_of(text)] for text, _ in rows]
            encodings = self._cut.encode_batch(words, is_pretokenized=True)
        elif task == "question_answering":
            questions = [self._first_pieces(text.strip(), most // 2) for text, _ in rows]
            encodings = self._cut.encode_batch([(one, row[1]) for one, row in zip(questions, rows, strict=True)])
            return [Window(row, part) for row, one in enumerate(encodings) for part in (one, *one.overflowing)]
        else:
            encodings = self._cut.encode_batch([text if pair is None else (text, pair) for text, pair in rows])
        return [Window(row, encoding) for row, encoding in enumerate(encodings)]

    def _first_pieces(self, text: str, count: int) -> str:
        offsets = self._whole.encode(text, add_special_tokens=False).offsets
        return text if len(offsets) <= count else text[: offsets[count - 1][1]]

    def _forward(self, windows: Sequence[Window]) -> None:
        length = max(len(window.encoding) for window in windows)
        shape = (len(windows), length)
        inputs = {name: np.zeros(shape, dtype=np.int64) for name in self.takes}
        inputs["input_ids"].fill(self.pad_id)
        for at, window in enumerate(windows):
            own = {
                "input_ids": window.encoding.ids,
                "attention_mask": window.encoding.attention_mask,
                "token_type_ids": window.encoding.type_ids,
            }
            for name in self.takes:
                inputs[name][at, : len(window.encoding)] = own[name]
        for window, values in zip(windows, self.forward(inputs), strict=True):
            window.logits = values if values.ndim == 1 else values[: len(window.encoding)]

    def _single_label_classification(self, row: Row, windows: Sequence[Window]) -> Answer:
        logits = windows[0].logits
        label = self.served.labels[int(np.argmax(logits))]
        return {"logits": logits, "probabilities": softmax(logits), "label": label}

    def _multi_label_classification(self, row: Row, windows: Sequence[Window]) -> Answer:
        logits = windows[0].logits
        # A probability of one half is a logit of zero.
        chosen = [name for name, logit in zip(self.served.labels, logits, strict=True) if logit > 0]
        probabilities = 1 / (1 + np.exp(-np.clip(logits, -60, 60)))
        return {"logits": logits, "probabilities": probabilities, "label": chosen}

    def _regression(self, row: Row, windows: Sequence[Window]) -> Answer:
        return {"logits": windows[0].logits}

    def _token_classification(self, row: Row, windows: Sequence[Window]) -> Answer:
        """Of each word what its first piece says; words past max_length are tagged outside, with logits of 0."""
        names, encoding = self.served.labels, windows[0].encoding
        count = sum(1 for _ in words_of(row[0]))
        logits = np.zeros((count, len(names)), dtype=np.float32)
        tags = ["O" if "O" in names else names[0]] * count
        for word, pieces in groupby(range(len(encoding)), key=encoding.word_ids.__getitem__):
            if word is not None:
                logits[word] = windows[0].logits[next(pieces)]
                tags[word] = names[int(np.argmax(logits[word]))]
        return {"logits": logits, "probabilities": softmax(logits), "label": tags}

    def _question_answering(self, row: Row, windows: Sequence[Window]) -> Answer:
        """The best span over the windows of a context; an empty answer where there is none to choose from."""
        best: tuple[float, Answer] = (-np.inf, {"label": "", "score": 0.0, "start": 0, "end": 0})
        for window in windows:
            inside = [part == 1 for part in window.encoding.sequence_ids]
            offsets = window.encoding.offsets
            starts = [begin if own else -1 for (begin, _), own in zip(offsets, inside, strict=True)]
            found = max(spans(window.logits, starts), key=lambda span: span[0], default=None)
            if found is not None and found[0] > best[0]:
                total, first, last = found
                probability = softmax(window.logits.T)
                score = float(probability[0, first] * probability[1, last])
                begin, end = starts[first], offsets[last][1]
                answer = (row[1] or "")[begin:end]
                best = (total, {"label": answer, "score": score, "start": begin, "end": end})
        return best[1]


def by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of the rows, in groups that are padded together at the least cost.

    A group of B rows costs B * longest + FORWARD_PIECES pieces; of the rows in order of length the cheapest cut is
    found, between different lengths only.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    ends = [0, *(at for at in range(1, len(order)) if lengths[order[at]] > lengths[order[at - 1]]), len(order)]
    costs, cuts = [0.0], [0]
    for end in ends[1:]:
        longest = lengths[order[end - 1]]
        tried = [
            (costs[at] + (end - begin) * longest + FORWARD_PIECES, at) for at, begin in enumerate(ends[: len(costs)])
        ]
        cost, at = min(tried)
        costs.append(cost)
        cuts.append(at)
    groups, at = [], len(ends) - 1
    while at > 0:
        groups.append(order[ends[cuts[at]] : ends[at]])
        at = cuts[at]
    return groups


def words_of(text: str) -> Iterator[re.Match[str]]:
    """The words that are tagged: what stands between spaces."""
    return re.finditer(r"\S+", text)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    total: np.ndarray = powers / powers.sum(axis=-1, keepdims=True)
    return total


def read_json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
