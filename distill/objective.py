"""The weighted sum of loss terms, and what it asks of both models.
The terms themselves are left to losses/, keeping their gradients in proportion to balance.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.activations import Activations, Needs
from distill.losses import Batch, LossTerm, Match


@dataclass(frozen=True)
class LossReport:
    """total: scalar with gradient. parts: each term's unweighted value, scalar, detached, by name."""

    total: Tensor
    parts: Mapping[str, Tensor]


class Objective:
    """L = sum over terms of weight * sum over examples of example_weight * term.

    `batch["example_weight"]` (B,) makes the sum over all micro-batches and processes of one optimisation step the
    mean over that step's examples; see `data.Batches`.
    """

    def __init__(self, terms: Mapping[str, LossTerm], match: Match) -> None:
        if not terms:
            raise ValueError("an objective needs at least one loss term")
        self.terms = dict(terms)
        self.match = match
        needs = [term.needs(match.layers) for term in self.terms.values()]
        self.student_needs = _union([student for student, _ in needs])
        self.teacher_needs = _union([teacher for _, teacher in needs])
        self.uses_teacher = any(term.uses_teacher for term in self.terms.values())

    @property
    def weights(self) -> dict[str, float]:
        """Each term's configured weight, by name."""
        return {name: term.weight for name, term in self.terms.items()}

    def values(self, student: Activations, teacher: Activations, batch: Batch) -> dict[str, Tensor]:
        """Each term's unweighted value over the batch, scalar with gradient, by name."""
        weights = batch["example_weight"]
        return {name: (term(student, teacher, batch, self.match) * weights).sum() for name, term in self.terms.items()}

    def __call__(
        self, student: Activations, teacher: Activations, batch: Batch, weights: Mapping[str, float] | None = None
    ) -> LossReport:
        """The total and its parts; `weights` stand in for the configured ones where given (see balance.py)."""
        values, weights = self.values(student, teacher, batch), weights or self.weights
        total = torch.stack([weights[name] * value for name, value in values.items()]).sum()
        return LossReport(total, {name: value.detach() for name, value in values.items()})


def _union(needs: list[Needs]) -> Needs:
    union = Needs()
    for one in needs:
        union = union | one
    return union
