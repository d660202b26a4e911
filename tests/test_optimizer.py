"""Claims about parameter groups and the learning-rate schedule; rates are worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from distill.optimizer import build_optimizer, learning_rate_factor


def rates(schedule: str, total: int, warmup: int) -> list[float]:
    return [learning_rate_factor(schedule, step, total, warmup) for step in range(total)]


def test_linear_rises_to_the_peak_and_falls_to_zero_after_the_last_step() -> None:
    expected = [1 / 4, 2 / 4, 3 / 4, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert rates("linear", total=9, warmup=3) == pytest.approx(expected)
    assert learning_rate_factor("linear", 9, 9, 3) == 0


def test_cosine_falls_as_half_a_wave() -> None:
    half = math.sqrt(0.5)
    expected = [1 / 2, 1, (1 + half) / 2, 1 / 2, (1 - half) / 2]
    assert rates("cosine", total=5, warmup=1) == pytest.approx(expected)
    assert learning_rate_factor("cosine", 5, 5, 1) == pytest.approx(0)


def test_constant_stays_at_the_peak_after_warm_up() -> None:
    assert rates("constant", total=5, warmup=2) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (2, 1), (10, 0), (10, 9)])
def test_every_step_learns_and_none_exceeds_the_peak(schedule: str, total: int, warmup: int) -> None:
    values = rates(schedule, total, warmup)
    assert all(0 < value <= 1 for value in values)
    assert warmup or values[0] == 1


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_rate_stays_at_zero_beyond_the_last_step(schedule: str) -> None:
    assert learning_rate_factor(schedule, 20, 10, 2) == pytest.approx(0)


def test_matrices_decay_and_vectors_do_not(build_model) -> None:
    model = build_model()
    optimizer = build_optimizer(model, learning_rate=1e-3, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.keys() == dict(model.named_parameters()).keys(), "each parameter once"
    for name, value in decay.items():
        assert value == (0.0 if name.endswith("bias") or "LayerNorm" in name else 0.1), name


def test_a_step_without_gradient_shrinks_only_what_decays() -> None:
    """AdamW: w <- w (1 - rate * decay), apart from the gradient."""
    layer = nn.Linear(2, 2)
    nn.init.ones_(layer.weight)
    nn.init.ones_(layer.bias)
    optimizer = build_optimizer(layer, learning_rate=0.5, weight_decay=0.1)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert layer.weight.flatten().tolist() == pytest.approx([0.95] * 4)
    assert layer.bias.tolist() == [1, 1]


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    model[0].requires_grad_(False)
    groups = build_optimizer(model, 1e-3, 0.1).param_groups
    assert [len(group["params"]) for group in groups] == [2]
    assert groups[0]["weight_decay"] == 0
