"""The task's rows as one tokenizer cuts them: encoded splits, training batches, figures.
Teacher and student share one of these, unless student.tokenizer has another vocabulary than the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.data import Batches, Collator, Placement, RowStates, tokenize
from distill.evaluation import evaluate_model, predict_share, score
from distill.spelling import Spelling
from distill.training import TrainingOptions, Validation

if TYPE_CHECKING:
    from pipelines.run import Run


@dataclass
class Encoded:
    """Rows of `run` in the pieces of `tokenizer`."""

    run: Run
    tokenizer: PreTrainedTokenizerBase
    spelling: Spelling | None = None
    """Of a student of a cut vocabulary, whose training batches have its own pieces beside these."""
    like: Encoded | None = None
    """Another with the same tokenizer, whose splits are taken."""

    @cached_property
    def features(self) -> dict[str, Dataset]:
        """The encoded splits."""
        if self.like is not None:
            return self.like.features
        return {split: self.encode(rows, split) for split, rows in self.run.data.splits.items()}

    @cached_property
    def collator(self) -> Collator:
        """Pads rows for predictions; training batches are padded as data.padding says."""
        return Collator(self.tokenizer, self.run.task)

    def encode(self, rows: Dataset, name: str) -> Dataset:
        with self.run.accelerator.main_process_first():
            return tokenize(rows, self.run.task, self.tokenizer, self.run.config.data.max_length, f"tokenise {name}")

    def batches(
        self,
        features: Dataset,
        options: TrainingOptions,
        placement: Placement | None = None,
        states: RowStates | None = None,
    ) -> Batches:
        """Training steps over encoded rows, this process's share of them where no other placement is given."""
        data = self.run.config.data
        length = data.max_length if data.padding == "max_length" else None
        collator = Collator(self.tokenizer, self.run.task, length=length, spelling=self.spelling)
        return self.run.batches(features, options, collator, placement, states)

    def validation(self, model: PreTrainedModel) -> Validation:
        """Chooses weights by the task's deciding figure on the validation split."""
        return Validation(lambda: self.figures(model, "validation"), self.run.metric, higher_is_better=True)

    def logits(self, model: PreTrainedModel, split: str) -> list[np.ndarray]:
        """Of every row of a split, found by this process alone."""
        batch_size = self.run.config.evaluate.batch_size
        found = predict_share(model, self.features[split], self.collator, batch_size, Placement())
        return [row for _, row in sorted(found, key=lambda pair: pair[0])]

    def score(self, logits: Sequence[np.ndarray], split: str) -> dict[str, float]:
        """The task's figures of given logits."""
        return score(logits, self.features[split], self.run.data.splits[split], self.run.task, self.run.data.names)

    def predictions(self, logits: Sequence[np.ndarray], split: str) -> list[Any]:
        """What given logits say of each row."""
        return self.run.task.decode(logits, self.features[split], self.run.data.splits[split], self.run.data.names)[0]

    def figures(self, model: PreTrainedModel, split: str) -> dict[str, float]:
        """The task's figures of a model on a split: validation chooses weights, test is reported."""
        return evaluate_model(
            model,
            self.features[split],
            self.run.data.splits[split],
            self.run.task,
            self.run.data.names,
            self.collator,
            self.run.accelerator,
            self.run.config.evaluate.batch_size,
        )
