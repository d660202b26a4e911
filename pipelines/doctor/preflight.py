"""What the checks look at: the run's models and samples of its rows, each made once when first asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel

from distill.evaluation import predict, score
from pipelines.pipeline import Due
from pipelines.run import Run

TEXT_ROWS = 2_000
"""Rows of a split that are tokenised uncut."""
TEACHER_ROWS = 512
"""Validation rows that the teacher predicts."""
UNCUT = 1_000_000
"""A length in word pieces that no row has."""


@dataclass
class Preflight:
    """What several checks look at, each made once when first asked for."""

    run: Run
    due: Sequence[Due]

    @cached_property
    def teacher_is_ready(self) -> bool:
        """Whether the teacher has its trained head: it was given so, or the teacher stage is finished and stays."""
        if self.run.config.teacher.training is None:
            return True
        to_do = any(one.stage.name == "teacher" and not one.done for one in self.due)
        return not to_do and (self.run.folder / "teacher" / "result.json").is_file()

    @cached_property
    def teacher(self) -> PreTrainedModel:
        return self.run.load_task_teacher()

    @cached_property
    def held_out(self) -> Dataset:
        """The encoded validation rows that the teacher predicts: all windows of up to TEACHER_ROWS rows."""
        features = self.run.teacher_encoded.features["validation"]
        chosen = self._chosen("validation", TEACHER_ROWS)
        return features.select(np.flatnonzero(np.isin(features["row"][:], chosen)))

    @cached_property
    def held_out_rows(self) -> int:
        return len(set(self.held_out["row"][:]))

    @cached_property
    def logits(self) -> list[np.ndarray]:
        """The teacher's, of `held_out`."""
        run = self.run
        return predict(
            self.teacher, self.held_out, run.teacher_encoded.collator, run.accelerator, run.config.evaluate.batch_size
        )

    @cached_property
    def uncut(self) -> dict[str, Mapping[str, list[Any]]]:
        """Up to TEXT_ROWS rows a split, encoded at their full length."""
        encoded = {}
        for split in self.run.data.splits:
            rows = self.texts(split)
            encoded[split] = self.run.task.encode(rows[:], 0, self.run.tokenizer, UNCUT)
        return encoded

    def texts(self, split: str) -> Dataset:
        """The rows behind `uncut`."""
        return self.run.data.splits[split].select(self._chosen(split, TEXT_ROWS))

    def figure(self, logits: Sequence[np.ndarray]) -> float:
        """What the deciding metric gives these logits of `held_out`."""
        run = self.run
        return score(logits, self.held_out, run.data.splits["validation"], run.task, run.data.names)[run.metric]

    def _chosen(self, split: str, count: int) -> np.ndarray:
        """Rows drawn by the seed, in order: files are often sorted by label."""
        rows = len(self.run.data.splits[split])
        drawn = np.random.default_rng(self.run.config.seed).permutation(rows)[:count]
        return np.sort(drawn)
