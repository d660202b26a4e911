"""Terms on hidden states: the embeddings' output and the layers'.
The projection to the teacher's width is the student's own, in students.py."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.activations import Activations, Needs
from distill.layer_map import LayerMap
from distill.losses.term import Batch, LossTerm, Match, Padding, masked_mean, positions
from distill.settings import settings

Distance = Literal["mse", "cosine"]


@settings
class EmbeddingLoss(LossTerm):
    """Distance of the embedding outputs.

    mse     L = mean over n tokens and D of (E_s W - E_t)^2
    cosine  L = mean over n tokens of 1 - cos(E_s W, E_t)
    E is the output of the embeddings (after their LayerNorm), W the student's projection, already applied by the
    student. Shapes (B, T, D).
    Source: TinyBERT (arXiv 1909.10351), eq. 9. The published code shares W with the hidden states:
    student.projection=shared.
    """

    distance: Distance = "mse"
    """mse; or cosine, which leaves the length of the vectors free."""
    padding: Padding = "masked"
    """included: average over padded positions too, as the published code does."""

    def needs(self, layers: LayerMap) -> tuple[Needs, Needs]:
        return Needs(hidden=frozenset({0})), Needs(hidden=frozenset({0}))

    def __call__(self, student: Activations, teacher: Activations, batch: Batch, match: Match) -> Tensor:
        return _distance(student.hidden[0], teacher.hidden[0], positions(batch, self.padding), self.distance)


@settings
class HiddenLoss(LossTerm):
    """Distance of the hidden states of mapped layers, summed over the pairs (m, g).

    mse     L = sum over pairs of mean over n tokens and D of (H_s^m W - H_t^g)^2
    cosine  L = sum over pairs of mean over n tokens of 1 - cos(H_s^m W, H_t^g)
    Shapes (B, T, D).
    Source: mse: TinyBERT (arXiv 1909.10351), eq. 8; cosine: DistilBERT (arXiv 1910.01108), sec. 3, there for the last
    layer alone (layer_map.hidden_pairs).
    """

    distance: Distance = "mse"
    """mse; or cosine, which leaves the length of the vectors free."""
    padding: Padding = "masked"
    """included: average over padded positions too, as the published code does."""

    def needs(self, layers: LayerMap) -> tuple[Needs, Needs]:
        students, teachers = (frozenset(side) for side in zip(*layers.hidden, strict=True))
        return Needs(hidden=students), Needs(hidden=teachers)

    def __call__(self, student: Activations, teacher: Activations, batch: Batch, match: Match) -> Tensor:
        valid = positions(batch, self.padding)
        errors = [_distance(student.hidden[m], teacher.hidden[g], valid, self.distance) for m, g in match.layers.hidden]
        return torch.stack(errors).sum(0)


def _distance(student: Tensor, teacher: Tensor, valid: Tensor, distance: Distance) -> Tensor:
    student, teacher = student.float(), teacher.float()
    if distance == "cosine":
        return masked_mean(1 - F.cosine_similarity(student, teacher, dim=-1), valid)
    return masked_mean((student - teacher).square().mean(-1), valid)
