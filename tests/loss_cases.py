"""Random activations of a small student and teacher, and what the tests of losses share.
The claims are in test_losses (all terms), test_hidden_losses, test_attention_losses and test_prediction_losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.activations import Activations
from distill.attention import AttentionInputs
from distill.layer_map import LayerMap
from distill.losses import (
    IGNORED,
    Logits,
    LossTerm,
    Match,
)

LENGTHS = (5, 3, 1)
B, T, D, H, C = 3, 5, 6, 2, 4
STUDENT_HEAD, TEACHER_HEAD = 3, 8
LAYERS = LayerMap(attention=((1, 2), (2, 4)), hidden=((1, 1), (2, 4)), student_layers=2, teacher_layers=4)
SHAPES = {
    Logits.CLASSES: (B, C),
    Logits.BINARIES: (B, C),
    Logits.VALUE: (B, 1),
    Logits.TOKEN_CLASSES: (B, T, C),
    Logits.SPAN: (B, T, 2),
}
NARROW, WIDE = range(3), range(5)  # student and teacher layers that the tests make, hidden 0 included


def make_batch(width: int = T) -> dict[str, Tensor]:
    return {"attention_mask": (torch.arange(width) < torch.tensor(LENGTHS)[:, None]).long()}


def make_activations(layers: range, head: int, seed: int, logits: Logits = Logits.CLASSES) -> Activations:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return Activations(
        hidden={m: random(B, T, D) for m in layers},
        attention={
            m: AttentionInputs(*(random(B, H, T, head) for _ in range(3)), scaling=head**-0.5) for m in layers if m
        },
        logits=2 * random(*SHAPES[logits]),
    )


def pair_of(logits: Logits = Logits.CLASSES) -> tuple[Activations, Activations]:
    return make_activations(NARROW, STUDENT_HEAD, 1, logits), make_activations(WIDE, TEACHER_HEAD, 2, logits)


def evaluate(term: LossTerm, logits: Logits = Logits.CLASSES, **more: Tensor) -> Tensor:
    student, teacher = pair_of(logits)
    return term(student, teacher, {**make_batch(), **more}, Match(LAYERS, logits))


def as_array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy().astype(np.float64)


def assert_close(values: Tensor, expected: list[float], tolerance: float = 1e-5) -> None:
    assert values.dtype is torch.float32
    assert values.tolist() == pytest.approx(expected, rel=tolerance, abs=1e-7)


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


LABELS = {
    Logits.CLASSES: [3, 0, 1],
    Logits.BINARIES: [[1.0, 0.0, 0.0, 1.0], [0.0] * 4, [1.0] * 4],
    Logits.VALUE: [0.5, -1.0, 3.0],
    # The third row carries no label at all.
    Logits.TOKEN_CLASSES: [[IGNORED, 2, IGNORED, 0, IGNORED], [1, 3, IGNORED, IGNORED, IGNORED], [IGNORED] * 5],
    Logits.SPAN: [[1, 4], [0, 2], [0, 0]],
}
