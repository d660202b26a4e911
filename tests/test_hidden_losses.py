"""Claims about the terms on hidden states and embeddings; the oracles are loops over single positions in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.activations import Activations
from distill.losses import (
    EmbeddingLoss,
    HiddenLoss,
    Logits,
    Match,
)
from tests.loss_cases import LAYERS, LENGTHS, B, D, T, as_array, assert_close, evaluate, make_batch, pair_of

# Hidden states and embeddings


def hidden_oracle(student: Tensor, teacher: Tensor, positions: list[range]) -> list[float]:
    s, t = as_array(student), as_array(teacher)
    return [
        math.fsum((s[b, i, d] - t[b, i, d]) ** 2 for i in valid for d in range(D)) / (len(valid) * D)
        for b, valid in enumerate(positions)
    ]


POSITIONS = {"masked": [range(length) for length in LENGTHS], "included": [range(T)] * B}


@pytest.mark.parametrize("padding", ["masked", "included"])
def test_embedding_loss_is_the_mean_squared_error_of_hidden_state_zero(padding: Any) -> None:
    student, teacher = pair_of()
    assert_close(
        evaluate(EmbeddingLoss(padding=padding)),
        hidden_oracle(student.hidden[0], teacher.hidden[0], POSITIONS[padding]),
    )


@pytest.mark.parametrize("padding", ["masked", "included"])
def test_hidden_loss_sums_the_errors_of_the_mapped_pairs(padding: Any) -> None:
    student, teacher = pair_of()
    per_pair = [hidden_oracle(student.hidden[m], teacher.hidden[g], POSITIONS[padding]) for m, g in LAYERS.hidden]
    assert_close(evaluate(HiddenLoss(padding=padding)), np.sum(per_pair, axis=0).tolist())


def cosine_oracle(student: Tensor, teacher: Tensor, valid: list[range]) -> list[float]:
    s, t = as_array(student), as_array(teacher)
    angles = [
        [1 - s[b, i] @ t[b, i] / math.sqrt((s[b, i] @ s[b, i]) * (t[b, i] @ t[b, i])) for i in rows]
        for b, rows in enumerate(valid)
    ]
    return [math.fsum(row) / len(row) for row in angles]


@pytest.mark.parametrize("padding", ["masked", "included"])
def test_cosine_distance_is_one_minus_the_cosine_of_each_position(padding: Any) -> None:
    student, teacher = pair_of()
    per_pair = [cosine_oracle(student.hidden[m], teacher.hidden[g], POSITIONS[padding]) for m, g in LAYERS.hidden]
    assert_close(evaluate(HiddenLoss(distance="cosine", padding=padding)), np.sum(per_pair, axis=0).tolist())
    assert_close(
        evaluate(EmbeddingLoss(distance="cosine", padding=padding)),
        cosine_oracle(student.hidden[0], teacher.hidden[0], POSITIONS[padding]),
    )


def test_cosine_distance_by_hand() -> None:
    """(3, 4) against (4, 3) is 1 - 24/25; against its own double, 0; against its opposite, 2."""
    student = Activations(hidden={0: torch.tensor([[[3.0, 4.0]]]).repeat(3, 1, 1)})
    teacher = Activations(hidden={0: torch.tensor([[[4.0, 3.0]], [[6.0, 8.0]], [[-3.0, -4.0]]])})
    term, batch = EmbeddingLoss(distance="cosine"), {"attention_mask": torch.ones(3, 1)}
    assert_close(term(student, teacher, batch, Match(LAYERS, Logits.CLASSES)), [1 / 25, 0, 2], tolerance=1e-6)


def test_a_difference_of_two_everywhere_costs_four() -> None:
    student = Activations(hidden={0: torch.full((B, T, D), 3.0)})
    teacher = Activations(hidden={0: torch.ones(B, T, D)})
    assert EmbeddingLoss()(student, teacher, make_batch(), Match(LAYERS, Logits.CLASSES)).tolist() == [4, 4, 4]
