"""The squared difference of two models' attention scores, and its gradient, with or without a map of T x T.
Which pairs count and what the sum is divided by is left to attention.py.

With Q = [s_s Q_s, -s_t Q_t] and K = [K_s, K_t], (T, d) for d = d_s + d_t, the difference of the scores is D = Q K'.
Rows that do not count are zeroed in Q and K, so that they are zero in D.

map     |D|^2 from D itself. Backward needs D alone: dQ_s = 2 s_s D K_s, dK_s = 2 D' (s_s Q_s). O(T^2 d) time; one map
        is kept.
gram    |D|^2 = sum((Q'Q) * (K'K)), (d, d) each: dQ = 2 Q (K'K), dK = 2 K (Q'Q). O(T d^2) time, O(T d) memory. The sum
        cancels where the models agree: products in float32 lose the gradient at differences of a thousandth, so they
        are in float64, whose error is then below that of float32 inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

GRAM_LENGTH = 4
"""gram is taken on a CPU from T = GRAM_LENGTH * d on, where it was measured faster (d = 58: 37 and 34 ms at T = 256,
89 and 33 ms at 512). Accelerators, most of them slow in float64, keep the map."""


Side = tuple[Tensor, Tensor, float]
"""Queries and keys of a model, (B, H, T, d), and the scaling of its scores."""


def score_error(
    student: Side,
    teacher: Side,
    queries: Tensor,
    keys: Tensor,
    visible: Tensor | None = None,
    *,
    gram: bool | None = None,
) -> Tensor:
    """Sum over heads and counted (query, key) pairs of (A_s - A_t)^2, (B,), float32 or wider; A = scaling Q K'.

    Args:
        student, teacher: gradients reach the student's queries and keys.
        queries, keys: (B, T), nonzero where a position counts as a query, as a key.
        visible: (T, T) bool, pairs that count; None: all. Needs the map.
        gram: without a map; None: where it is faster.
    """
    (student_query, student_key, own), (teacher_query, teacher_key, given) = student, teacher
    dtype = student_query.dtype
    width = student_query.shape[-1] + teacher_query.shape[-1]
    if gram is None:
        long = student_query.shape[-2] >= GRAM_LENGTH * width
        gram = long and visible is None and student_query.device.type == "cpu"
    query = torch.cat((student_query.detach() * own, teacher_query.to(dtype) * -given), dim=-1)
    key = torch.cat((student_key.detach(), teacher_key.to(dtype)), dim=-1)
    query = query * queries[:, None, :, None].to(dtype)
    key = key * keys[:, None, :, None].to(dtype)
    with torch.autocast(query.device.type, enabled=False):  # backward multiplies in the dtype that was saved
        if gram:
            error: Tensor = _ByGram.apply(student_query, student_key, query, key, own)
        else:
            error = _ByMap.apply(student_query, student_key, query, key, own, visible)
    return error.to(torch.promote_types(dtype, torch.float32))


class _ByMap(torch.autograd.Function):
    """Gradients go to the first two inputs; what is computed with is the last ones, masked and side by side."""

    @staticmethod
    def forward(
        ctx: Any,
        student_query: Tensor,
        student_key: Tensor,
        query: Tensor,
        key: Tensor,
        own: float,
        visible: Tensor | None,
    ) -> Tensor:
        difference = torch.matmul(query, key.transpose(-1, -2))
        if visible is not None:
            difference.masked_fill_(~visible, 0)
        ctx.own, ctx.width = own, student_query.shape[-1]
        ctx.save_for_backward(query, key, difference)
        wide = torch.promote_types(difference.dtype, torch.float32)
        return torch.linalg.vector_norm(difference.flatten(1), dim=1, dtype=wide).square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, difference = ctx.saved_tensors
        factor = (2 * gradient)[:, None, None, None]
        for_query = torch.matmul(difference, key[..., : ctx.width]) * (factor * ctx.own)
        for_key = torch.matmul(difference.transpose(-1, -2), query[..., : ctx.width]) * factor
        return for_query.to(query.dtype), for_key.to(key.dtype), None, None, None, None


class _ByGram(torch.autograd.Function):
    """As _ByMap."""

    @staticmethod
    def forward(ctx: Any, student_query: Tensor, student_key: Tensor, query: Tensor, key: Tensor, own: float) -> Tensor:
        query, key = query.double(), key.double()
        products = [torch.matmul(side.transpose(-1, -2), side) for side in (query, key)]
        ctx.own, ctx.width, ctx.dtype = own, student_query.shape[-1], student_query.dtype
        ctx.save_for_backward(query, key, *products)
        return (products[0] * products[1]).sum((1, 2, 3))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, of_queries, of_keys = ctx.saved_tensors
        factor = (2 * gradient.double())[:, None, None, None]
        for_query = torch.matmul(query, of_keys[..., : ctx.width]) * (factor * ctx.own)
        for_key = torch.matmul(key, of_queries[..., : ctx.width]) * factor
        return for_query.to(ctx.dtype), for_key.to(ctx.dtype), None, None, None
