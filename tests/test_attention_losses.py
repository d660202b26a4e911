"""Claims about each loss term on attention; the oracles are loops over single queries and keys in float64."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.activations import Activations
from distill.attention import AttentionInputs
from distill.layer_map import LayerMap
from distill.losses import (
    AttentionLoss,
    Logits,
    Match,
    RelationLoss,
)
from tests.loss_cases import (
    LAYERS,
    LENGTHS,
    TEACHER_HEAD,
    WIDE,
    B,
    H,
    T,
    as_array,
    assert_close,
    evaluate,
    make_activations,
    make_batch,
    pair_of,
    softmax,
)

# Attention scores


def score(inputs: AttentionInputs, b: int, h: int, i: int, j: int) -> float:
    return math.fsum(as_array(inputs.query)[b, h, i] * as_array(inputs.key)[b, h, j]) / math.sqrt(
        inputs.query.shape[-1]
    )


def attention_oracle(padding: str) -> list[float]:
    """Masked keys score 0 on both sides; masked queries count only where padding is included."""
    student, teacher = pair_of()
    values = []
    for b, length in enumerate(LENGTHS):
        total = 0.0
        for m, g in LAYERS.attention:
            side = range(length) if padding == "masked" else range(T)
            errors = [
                (score(student.attention[m], b, h, i, j) - score(teacher.attention[g], b, h, i, j)) ** 2
                if j < length
                else 0.0
                for h in range(H)
                for i in side
                for j in side
            ]
            total += math.fsum(errors) / len(errors)
        values.append(total)
    return values


@pytest.mark.parametrize("padding", ["masked", "included"])
def test_attention_loss_is_the_mean_squared_error_of_the_scores(padding: Any) -> None:
    assert_close(evaluate(AttentionLoss(padding=padding)), attention_oracle(padding))


def test_attention_loss_by_hand() -> None:
    """Scores [[1, 1], [2, 2]] / 2 against 0: (1 + 1 + 4 + 4) / 4 / 4."""
    query, key = torch.tensor([1.0, 2.0]).view(1, 1, 2, 1), torch.ones(1, 1, 2, 1)
    student = Activations(attention={1: AttentionInputs(query, key, key, scaling=0.5)})
    teacher = Activations(attention={1: AttentionInputs(torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 2, 4), key, 0.5)})
    match = Match(LayerMap(((1, 1),), ((1, 1),), 1, 1), Logits.CLASSES)
    assert AttentionLoss()(student, teacher, {"attention_mask": torch.ones(1, 2)}, match).tolist() == [0.625]


def plain_map_gradients(student: AttentionInputs, teacher: AttentionInputs, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Float64 autograd of the formula as the paper writes it: two T x T maps, their difference, a masked mean."""
    query, key = (tensor.detach().double().requires_grad_() for tensor in (student.query, student.key))
    student_map = torch.einsum("bhid,bhjd->bhij", query, key) / math.sqrt(query.shape[-1])
    teacher_map = torch.einsum("bhid,bhjd->bhij", teacher.query.double(), teacher.key.double())
    teacher_map /= math.sqrt(teacher.query.shape[-1])
    valid = (mask[:, None, :, None] * mask[:, None, None, :]).double()
    squares = (student_map - teacher_map) ** 2 * valid
    (squares.sum((1, 2, 3)) / (H * valid.sum((1, 2, 3)))).mean().backward()
    assert query.grad is not None
    assert key.grad is not None
    return query.grad, key.grad


def attention_gradient_error(student: AttentionInputs, teacher: AttentionInputs) -> float:
    """Largest error of our gradients, relative to the largest entry of the exact ones."""
    batch, match = make_batch(), Match(LayerMap(((1, 1),), ((1, 1),), 1, 1), Logits.CLASSES)
    query, key = (tensor.clone().requires_grad_() for tensor in (student.query, student.key))
    ours = Activations(attention={1: AttentionInputs(query, key, student.value, student.scaling)})
    AttentionLoss()(ours, Activations(attention={1: teacher}), batch, match).mean().backward()
    exact = plain_map_gradients(student, teacher, batch["attention_mask"])
    return max(
        ((got.grad - want).abs().max() / want.abs().max()).item() for got, want in zip((query, key), exact, strict=True)
    )


def test_attention_gradient_is_that_of_the_plain_score_maps() -> None:
    student, teacher = pair_of()
    assert attention_gradient_error(student.attention[1], teacher.attention[2]) < 1e-6


def test_attention_gradient_stays_right_where_student_and_teacher_nearly_agree() -> None:
    """Differences of 1e-3 lose three of float32's digits, as they would in a difference of maps, and not six. How many
    are there to lose hangs on the processor's order of sums: 1e-6 were seen where nothing cancels."""
    teacher = make_activations(WIDE, TEACHER_HEAD, 2).attention[1]
    noise = torch.randn(teacher.query.shape, generator=torch.Generator().manual_seed(3))
    student = AttentionInputs(teacher.query + 1e-3 * noise, teacher.key, teacher.value, teacher.scaling)
    assert attention_gradient_error(student, teacher) < 5e-3


def mean_map(inputs: AttentionInputs, b: int, n: int, compare: str) -> np.ndarray:
    """Scores or probabilities of an example's n valid positions, averaged over its heads."""
    maps = []
    for h in range(inputs.query.shape[1]):
        scores = np.array([[score(inputs, b, h, i, j) for j in range(n)] for i in range(n)])
        maps.append(scores if compare == "scores" else np.apply_along_axis(softmax, 1, scores))
    return np.mean(maps, axis=0)


def kl(teacher: np.ndarray, student: np.ndarray) -> float:
    """Mean over rows."""
    return float(np.mean([np.sum(t * np.log(t / s)) for t, s in zip(teacher, student, strict=True)]))


def test_probabilities_are_compared_by_their_divergence() -> None:
    student, teacher = pair_of()
    expected = []
    for b, n in enumerate(LENGTHS):
        total = 0.0
        for m, g in LAYERS.attention:
            for h in range(H):
                t, s = (
                    np.array([softmax(np.array([score(a, b, h, i, j) for j in range(n)])) for i in range(n)])
                    for a in (teacher.attention[g], student.attention[m])
                )
                total += kl(t, s) / H
        expected.append(total)
    assert_close(evaluate(AttentionLoss(compare="probabilities")), expected)


@pytest.mark.parametrize("compare", ["scores", "probabilities"])
def test_averaged_heads_compare_mean_maps_of_any_two_head_counts(compare: Any) -> None:
    teacher = make_activations(WIDE, TEACHER_HEAD, 2)
    generator = torch.Generator().manual_seed(4)
    student = Activations(
        attention={
            m: AttentionInputs(*(torch.randn(B, 3, T, 4, generator=generator) for _ in range(3)), scaling=0.5)
            for m in (1, 2)
        }
    )
    expected = []
    for b, n in enumerate(LENGTHS):
        pairs = [
            (mean_map(teacher.attention[g], b, n, compare), mean_map(student.attention[m], b, n, compare))
            for m, g in LAYERS.attention
        ]
        expected.append(sum(float(np.mean((t - s) ** 2)) if compare == "scores" else kl(t, s) for t, s in pairs))
    term = AttentionLoss(compare=compare, heads="averaged")
    assert_close(term(student, teacher, make_batch(), Match(LAYERS, Logits.CLASSES)), expected)


# Windows


def with_window(inputs: AttentionInputs, window: int | None) -> AttentionInputs:
    return dataclasses.replace(inputs, window=window)


def windowed_oracle(compare: str, padding: str, width: int) -> list[float]:
    """Only the pairs at most `width` apart exist, for both models; heads are compared one by one."""
    student, teacher = pair_of()
    values = []
    for b, n in enumerate(LENGTHS):
        side, total = (n if padding == "masked" else T), 0.0
        for (m, g), h in itertools.product(LAYERS.attention, range(H)):
            own, given = student.attention[m], teacher.attention[g]
            near = [[j for j in range(side) if abs(i - j) <= width] for i in range(side)]
            if compare == "scores":
                errors = [
                    (score(own, b, h, i, j) - score(given, b, h, i, j)) ** 2 if j < n else 0.0
                    for i in range(side)
                    for j in near[i]
                ]
            else:
                maps = [
                    [softmax(np.array([score(a, b, h, i, j) for j in near[i]])) for i in range(n)] for a in (given, own)
                ]
                errors = [float(np.sum(t * np.log(t / s))) for t, s in zip(*maps, strict=True)]
            total += math.fsum(errors) / len(errors) / H
        values.append(total)
    return values


@pytest.mark.parametrize(("student_window", "teacher_window"), [(None, 1), (1, None), (3, 1), (1, 1)])
@pytest.mark.parametrize(
    ("compare", "padding"), [("scores", "masked"), ("scores", "included"), ("probabilities", "masked")]
)
def test_only_pairs_within_both_windows_are_compared(
    student_window: int | None, teacher_window: int | None, compare: Any, padding: Any
) -> None:
    student, teacher = pair_of()
    own = {m: with_window(inputs, student_window) for m, inputs in student.attention.items()}
    given = {g: with_window(inputs, teacher_window) for g, inputs in teacher.attention.items()}
    term = AttentionLoss(compare=compare, padding=padding)
    values = term(Activations(attention=own), Activations(attention=given), make_batch(), Match(LAYERS, Logits.CLASSES))
    assert_close(values, windowed_oracle(compare, padding, width=1))


@pytest.mark.parametrize("compare", ["scores", "probabilities"])
@pytest.mark.parametrize("heads", ["paired", "averaged"])
def test_a_pair_beyond_the_window_gets_no_gradient(compare: Any, heads: Any) -> None:
    """Query 0 sees keys 0 and 1 of the teacher's: what key 4 is to it does not matter, and is not taught."""
    student, teacher = pair_of()
    query, key = (getattr(student.attention[1], name).clone().requires_grad_() for name in ("query", "key"))
    seen = torch.zeros(B, 1, T, 1)
    seen[:, :, 0] = 1
    own = AttentionInputs(query * seen, key, key, 0.5)
    given = with_window(teacher.attention[2], 1)
    given = dataclasses.replace(given, query=given.query * seen)
    match = Match(LayerMap(((1, 1),), ((1, 1),), 1, 1), Logits.CLASSES)
    term = AttentionLoss(compare=compare, heads=heads)
    term(Activations(attention={1: own}), Activations(attention={1: given}), make_batch(), match)[0].backward()
    assert key.grad is not None
    assert key.grad[0, :, :2].abs().min() > 0
    assert key.grad[0, :, 2:].abs().max() == 0


def test_relations_are_not_narrowed_by_a_window() -> None:
    student, teacher = pair_of()
    narrow = Activations(attention={g: with_window(inputs, 1) for g, inputs in teacher.attention.items()})
    match = Match(LAYERS, Logits.CLASSES)
    plain, windowed = (RelationLoss()(student, one, make_batch(), match) for one in (teacher, narrow))
    assert torch.equal(plain, windowed)


# Relations


def relation(x: Tensor, b: int, head: int, heads: int, n: int) -> np.ndarray:
    """One relation head of one example: columns [head r, (head + 1) r) of all heads side by side."""
    flat = np.concatenate([as_array(x)[b, h, :n] for h in range(x.shape[1])], axis=1)
    r = flat.shape[1] // heads
    part = flat[:, head * r : (head + 1) * r]
    return np.apply_along_axis(softmax, 1, part @ part.T / math.sqrt(r))


@pytest.mark.parametrize("relations", [("query", "key", "value"), ("value",)])
@pytest.mark.parametrize("heads", [None, 2, 1])
def test_relations_are_compared_by_their_divergence_whatever_the_heads(
    relations: tuple[Any, ...], heads: int | None
) -> None:
    """The teacher's 2 heads of 8 and the student's 2 of 3 are cut anew: by default into gcd(16, 6) = 2."""
    student, teacher = pair_of()
    count = heads or 2
    expected = [
        sum(
            kl(
                relation(getattr(teacher.attention[g], name), b, head, count, n),
                relation(getattr(student.attention[m], name), b, head, count, n),
            )
            / count
            for m, g in LAYERS.attention
            for name in relations
            for head in range(count)
        )
        for b, n in enumerate(LENGTHS)
    ]
    assert_close(evaluate(RelationLoss(relations=relations, relation_heads=heads)), expected)


def test_relation_by_hand() -> None:
    """Values (0, a) of one head of width 1: rows of X X' are (0, 0) and (0, a^2); the teacher's a is 0."""
    values = torch.tensor([[[[0.0], [math.sqrt(math.log(3))]]]])
    zeros = torch.zeros(1, 1, 2, 1)
    student = Activations(attention={1: AttentionInputs(zeros, zeros, values, 1.0)})
    teacher = Activations(attention={1: AttentionInputs(zeros, zeros, zeros, 1.0)})
    match = Match(LayerMap(((1, 1),), ((1, 1),), 1, 1), Logits.CLASSES)
    term, batch = RelationLoss(relations=("value",)), {"attention_mask": torch.ones(1, 2)}
    # Row 1 agrees; row 2 is (1/4, 3/4) against (1/2, 1/2).
    expected = (0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2
    assert_close(term(student, teacher, batch, match), [expected])
