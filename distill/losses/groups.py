"""The loss terms of a phase by name: the name is the key in a config and in the log."""

from __future__ import annotations

from dataclasses import field

from transformers import PreTrainedConfig

from distill.losses.attention import AttentionLoss, RelationLoss
from distill.losses.hidden import EmbeddingLoss, HiddenLoss
from distill.losses.predictions import LabelLoss, LogitsLoss
from distill.losses.term import LossTerm
from distill.settings import settings


@settings
class GeneralLosses:
    """Terms of general distillation; null switches one off."""

    embedding: EmbeddingLoss | None = field(default_factory=EmbeddingLoss)
    attention: AttentionLoss | None = field(default_factory=AttentionLoss)
    relations: RelationLoss | None = None
    hidden: HiddenLoss | None = field(default_factory=HiddenLoss)

    def intermediate(self) -> dict[str, LossTerm]:
        """The terms on layers that are on, by name."""
        return self._on("embedding", "attention", "relations", "hidden")

    def _on(self, *names: str) -> dict[str, LossTerm]:
        return {name: term for name in names if (term := getattr(self, name)) is not None}


@settings
class TaskLosses(GeneralLosses):
    """Terms of task distillation: those of the intermediate phase, and logits and labels after it.

    A regression learns from the teacher's scores (logits, the default), from the true ones (labels), or from both:
    the published code takes the true ones for STS-B (logits: null, labels: {}).
    """

    logits: LogitsLoss | None = field(default_factory=LogitsLoss)
    labels: LabelLoss | None = None

    def prediction(self) -> dict[str, LossTerm]:
        """The terms on predictions that are on, by name."""
        return self._on("logits", "labels")


def check_models(losses: GeneralLosses, key: str, student: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
    """Refuse terms that cannot compare these two models.

    Args:
        key: where the losses stand in the config, `task.losses` or `general.losses`.

    Raises:
        UserError: naming the term, the rule and the remedy.
    """
    for name, term in losses.intermediate().items():
        term.check(f"{key}.{name}", student, teacher)
