"""What every loss term is: a weight, what it asks of both models, one value an example.
The terms stand in the files beside this one, their names in groups.py.

Every term returns one float32 value an example, (B,): a mean over that example's own valid positions. A batch's loss
is then a plain mean over examples, so that it depends neither on padding nor on how examples are spread over batches,
accumulation steps and processes.

Letters: B examples, T tokens, H heads, d head width, D teacher width, C classes, n tokens that are not padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor
from transformers import PreTrainedConfig

from distill.activations import Activations, Needs
from distill.layer_map import LayerMap
from distill.settings import settings

Batch = Mapping[str, Tensor]
Padding = Literal["masked", "included"]
IGNORED = -100
"""The label of a position that carries none (transformers' own convention)."""


class Logits(Enum):
    """What a row of logits stands for; it decides the softmax, the sigmoid or the plain difference."""

    CLASSES = "one of C classes, (B, C)"
    BINARIES = "C yes-or-no labels, (B, C)"
    VALUE = "a number, (B, 1)"
    TOKEN_CLASSES = "one of C classes a token, (B, T, C)"
    SPAN = "the first and the last token of an answer, (B, T, 2)"


@dataclass(frozen=True)
class Match:
    """What stands opposite what: the layer map, and the meaning of the logits."""

    layers: LayerMap
    logits: Logits


@settings
class LossTerm:
    weight: NonNegativeFloat = 1.0
    """Factor of this term in the objective; with balance: gradient, its share of the gradient."""

    uses_teacher: ClassVar[bool] = True

    def needs(self, layers: LayerMap) -> tuple[Needs, Needs]:
        """What the term asks of the student and of the teacher."""
        raise NotImplementedError

    def check(self, key: str, student: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
        """Raise UserError where these two models cannot be compared so. `key` is the term's place in the config."""

    def __call__(self, student: Activations, teacher: Activations, batch: Batch, match: Match) -> Tensor:
        """The term's value for each example, (B,) float32."""
        raise NotImplementedError


def positions(batch: Batch, padding: Padding) -> Tensor:
    """(B, T): 1 where a position counts."""
    mask = batch["attention_mask"]
    return mask if padding == "masked" else torch.ones_like(mask)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of (B, T) values over each row's valid positions; a row with none gives 0."""
    weights = mask.to(values.dtype)
    return (values * weights).sum(-1) / weights.sum(-1).clamp(min=1)
