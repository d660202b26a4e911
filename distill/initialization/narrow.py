"""Embeddings narrower than the layers (student.embedding_width): their directions, and the matrix behind them.
The vectors themselves, and everything above, are left to cut.py.

Half of what decides is the sample's tokens, half the student's pieces, each as often as any other: names that are yet
to be read are among the rare ones, and the sample has few of those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.activations import model_inputs
from distill.initialization.factors import principal_directions
from distill.initialization.observe import Moments
from distill.students import Student

RCOND = 1e-4
"""Singular values below this share of the largest are noise: a normalised row adds up to nothing but for rounding."""


@torch.no_grad()
def piece_outputs(body: PreTrainedModel, pieces: Tensor) -> Tensor:
    """What the embeddings of an encoder give for its word vectors `pieces` (V, E), of the first type at a position that
    is the mean of all: (V, D) float64, on the CPU."""
    outputs = _normalised(body.embeddings, pieces)
    if hasattr(body, "embeddings_project"):
        outputs = body.embeddings_project(outputs)
    return outputs.cpu().double()


def _normalised(embeddings: Any, pieces: Tensor) -> Tensor:
    frame = embeddings.position_embeddings.weight.mean(0) + embeddings.token_type_embeddings.weight[0]
    normalised: Tensor = embeddings.LayerNorm(pieces.to(frame.device) + frame)
    return normalised


def narrow_directions(pieces: Tensor, tokens: Moments, subspace: Tensor, width: int) -> Tensor:
    """(D_s, width): the leading directions of the embeddings' output within the student's subspace.

    Args:
        pieces: the teacher's outputs for the student's pieces, (V, D_t).
        tokens: of its outputs for the sample's tokens.
        subspace: P, (D_t, D_s).
    """
    seconds = [tokens.second[0], pieces.T @ pieces]
    pooled = torch.stack([subspace.T @ second @ subspace / second.trace() for second in seconds]).sum(0)
    return principal_directions(pooled, width)


@torch.no_grad()
def fit_matrix(
    student: Student,
    pieces: Tensor,
    states: Sequence[Tensor],
    subspace: Tensor,
    batches: Sequence[Mapping[str, Tensor]],
) -> None:
    """Least squares of y = P' h_0, the teacher's, on (x, 1), x what the student's norm gives: the matrix and bias
    between its embeddings and its first layer; the smallest solution where x leaves it open.

    Args:
        pieces: the teacher's outputs for the student's pieces, (V, D_t).
        states: its outputs for the real tokens of each batch, (N, D_t).
    """
    small: Any = student.model.base_model
    seen = _normalised(small.embeddings, small.embeddings.word_embeddings.weight).cpu().double()
    tokens = []
    for batch in batches:
        inputs = model_inputs(small, student.by_position(batch))
        valid = inputs.pop("attention_mask").cpu().bool()
        tokens.append(small.embeddings(**inputs).cpu()[valid].double())
    xs, ys = (seen, torch.cat(tokens)), (pieces, torch.cat(list(states)).double())
    rows = [torch.cat((x, torch.ones(len(x), 1, dtype=x.dtype)), dim=1) / len(x) ** 0.5 for x in xs]
    goals = [y @ subspace / len(y) ** 0.5 for y in ys]
    solved = torch.linalg.lstsq(torch.cat(rows), torch.cat(goals), rcond=RCOND, driver="gelsd").solution
    matrix: nn.Linear = small.embeddings_project
    matrix.weight.copy_(solved[:-1].T)
    matrix.bias.copy_(solved[-1])
