"""Which augmented rows a fine-tuned teacher would keep.
Making the rows is left to replacement.py, loading the teacher to the caller."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.augmentation.options import AugmentOptions
from distill.data import Collator, Placement
from distill.evaluation import predict_share
from distill.losses import Logits
from distill.settings import UserError
from distill.tasks import TaskType

Row = dict[str, Any]

WITHOUT_LABEL = {
    Logits.VALUE: "a regression has numbers, no labels that agree or differ",
    Logits.TOKEN_CLASSES: "its tags belong to words, and the words that carry entities are not replaced",
    Logits.SPAN: "its answers belong to places in the text, and their words are not replaced",
}


def check_filter(task: TaskType) -> None:
    """Raises UserError where a teacher's label of a whole text is not what the task is about."""
    if task.logits in WITHOUT_LABEL:
        raise UserError(
            f"augment.filter: it compares the labels of whole texts, but task.type is {task.name}: "
            f"{WITHOUT_LABEL[task.logits]}. Set augment.filter to null."
        )


class TeacherFilter:
    """Says of augmented rows which to keep, by the teacher's labels; Augmenter's `keep`.

    same_label  label(copy) = label(source)
    confident   p(copy) >= filter_confidence

    One of several classes: the label is the likeliest class, p its softmax. Yes-or-no labels: the label is the set of
    those with probability over one half, p that of the least certain answer, min over C of max(s, 1 - s).

    A block's copies and sources go through the teacher together, in batches of similar length; blocks do not depend
    on the number of processes, so what is kept does not either.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: TaskType,
        rows: Dataset,
        options: AugmentOptions,
        *,
        max_length: int,
        batch_size: int,
    ) -> None:
        check_filter(task)
        self.teacher, self.tokenizer, self.task, self.rows, self.options = teacher, tokenizer, task, rows, options
        self.max_length, self.batch_size = max_length, batch_size
        self.collator = Collator(tokenizer, task)

    def __call__(self, made: list[Row]) -> list[bool]:
        """Whether to keep each of `made`, rows with source_row."""
        if self.options.filter == "confident":
            return (self._confidence(self._logits(made)) >= self.options.filter_confidence).tolist()
        sources = sorted({row["source_row"] for row in made})
        labels = self._labels(self._logits([*made, *self.rows.select(sources)]))
        of_source = dict(zip(sources, labels[len(made) :], strict=True))
        return [
            bool(np.array_equal(label, of_source[row["source_row"]]))
            for row, label in zip(made, labels[: len(made)], strict=True)
        ]

    def _logits(self, rows: list[Row]) -> np.ndarray:
        """(rows, C), in their order."""
        columns = {name: [row[name] for row in rows] for name in self.rows.column_names}
        features = Dataset.from_dict(self.task.encode(columns, 0, self.tokenizer, self.max_length))
        found = predict_share(self.teacher, features, self.collator, self.batch_size, Placement())
        return np.stack([logits for _, logits in sorted(found, key=lambda pair: pair[0])]).astype(np.float64)

    def _labels(self, logits: np.ndarray) -> np.ndarray:
        return logits > 0 if self.task.logits is Logits.BINARIES else logits.argmax(-1)

    def _confidence(self, logits: np.ndarray) -> np.ndarray:
        if self.task.logits is Logits.BINARIES:
            return (1 / (1 + np.exp(-np.abs(logits)))).min(-1)
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        return 1 / shares.sum(-1)
