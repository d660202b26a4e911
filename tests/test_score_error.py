"""Claims about distill/losses/score_error.py: with or without a map, values and gradients are those of float64 maps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill.losses.score_error import GRAM_LENGTH, score_error

HEADS, LENGTH = 3, 11


def sides(difference: float | None, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    """Queries and keys of a student and a teacher: unrelated, or of one width and so far apart."""
    random = torch.Generator().manual_seed(5)

    def draw(width: int) -> Tensor:
        return torch.randn(2, HEADS, LENGTH, width, generator=random)

    teacher = [draw(8), draw(8)]
    own = [draw(5), draw(5)] if difference is None else [side + difference * draw(8) for side in teacher]
    return [side.to(dtype) for side in own], [side.to(dtype) for side in teacher]


def masks(padded: bool) -> tuple[Tensor, Tensor]:
    queries, keys = torch.ones(2, LENGTH, dtype=torch.long), torch.ones(2, LENGTH, dtype=torch.long)
    if padded:
        keys[1, 6:] = 0
        queries[1, 8:] = 0
    return queries, keys


def exact(
    student: list[Tensor], teacher: list[Tensor], queries: Tensor, keys: Tensor, visible: Tensor | None, scale: float
) -> tuple[Tensor, list[Tensor]]:
    """From full maps in float64."""
    query, key = (side.double().requires_grad_() for side in student)
    maps = scale * query @ key.mT - 0.3 * teacher[0].double() @ teacher[1].double().mT
    counted = (queries[:, None, :, None] * keys[:, None, None, :]).bool()
    if visible is not None:
        counted = counted & visible
    error = torch.where(counted, maps, 0).square().sum((1, 2, 3))
    return error.detach(), list(torch.autograd.grad((error * torch.tensor([0.3, 0.7])).sum(), (query, key)))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize(
    ("difference", "tolerance"),
    [(None, 1e-6), (1.0, 1e-6), (1e-2, 3e-5), (1e-3, 3e-4)],
    ids=["random", "1", ".01", ".001"],
)
def test_value_and_gradient_are_those_of_float64_maps(
    difference: float | None, tolerance: float, gram: bool, padded: bool
) -> None:
    student, teacher = sides(difference)
    scale = 0.4 if difference is None else 0.3
    queries, keys = masks(padded)
    expected, gradients = exact(student, teacher, queries, keys, None, scale)
    query, key = (side.clone().requires_grad_() for side in student)
    error = score_error((query, key, scale), (teacher[0], teacher[1], 0.3), queries, keys, gram=gram)
    (error * torch.tensor([0.3, 0.7])).sum().backward()
    torch.testing.assert_close(error.double(), expected, rtol=tolerance, atol=0)
    for got, want in zip((query.grad, key.grad), gradients, strict=True):
        assert got is not None
        assert (got.double() - want).abs().max() < tolerance * want.abs().max()


def test_without_a_map_it_does_not_cancel() -> None:
    """At differences of 1e-3 products in float64 lose nothing, where float32 maps lose digits."""
    student, teacher = sides(1e-3)
    queries, keys = masks(True)
    _, gradients = exact(student, teacher, queries, keys, None, 0.3)
    query, key = (side.clone().double().requires_grad_() for side in student)
    error = score_error((query, key, 0.3), (teacher[0], teacher[1], 0.3), queries, keys, gram=True)
    (error * torch.tensor([0.3, 0.7])).sum().backward()
    for got, want in zip((query.grad, key.grad), gradients, strict=True):
        assert got is not None
        assert (got - want).abs().max() < 1e-9 * want.abs().max()


def test_pairs_outside_the_window_do_not_count() -> None:
    student, teacher = sides(None)
    queries, keys = masks(True)
    places = torch.arange(LENGTH)
    visible = (places[:, None] - places).abs() <= 2
    expected, gradients = exact(student, teacher, queries, keys, visible, 0.4)
    query, key = (side.clone().requires_grad_() for side in student)
    error = score_error((query, key, 0.4), (teacher[0], teacher[1], 0.3), queries, keys, visible)
    (error * torch.tensor([0.3, 0.7])).sum().backward()
    torch.testing.assert_close(error.double(), expected, rtol=1e-6, atol=0)
    for got, want in zip((query.grad, key.grad), gradients, strict=True):
        assert got is not None
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gram", [False, True])
def test_bf16_inputs_give_float32_values_and_bf16_gradients(gram: bool) -> None:
    student, teacher = sides(None, torch.bfloat16)
    queries, keys = masks(True)
    expected, gradients = exact(student, teacher, queries, keys, None, 0.4)
    query, key = (side.clone().requires_grad_() for side in student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        error = score_error((query, key, 0.4), (teacher[0], teacher[1], 0.3), queries, keys, gram=gram)
    (error * torch.tensor([0.3, 0.7])).sum().backward()
    assert error.dtype == torch.float32
    torch.testing.assert_close(error.double(), expected, rtol=1e-2, atol=0)
    for got, want in zip((query.grad, key.grad), gradients, strict=True):
        assert got is not None
        assert got.dtype == torch.bfloat16
        assert (got.double() - want).abs().max() < 2e-2 * want.abs().max()


def test_long_sequences_need_no_map_on_a_cpu() -> None:
    """The largest tensor that is kept for backward grows with T, not with its square."""
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    length = GRAM_LENGTH * 4
    query, key, given = (torch.randn(1, 1, length, 2, requires_grad=index < 2) for index in range(3))
    ones = torch.ones(1, length)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        score_error((query, key, 1.0), (given, given, 1.0), ones, ones)
        assert max(kept) == length * 4
        kept.clear()
        score_error((query, key, 1.0), (given, given, 1.0), ones, ones, gram=False)
    assert max(kept) == length * length
