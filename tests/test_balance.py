"""Claims about each term's share of the gradient and the weights that keep it."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from distill.activations import capture
from distill.attention import show_attention
from distill.balance import GradientBalance, gradient_norms, gradient_shares
from distill.layer_map import LayerMapOptions, build_layer_map
from distill.losses import AttentionLoss, HiddenLoss, LabelLoss, Logits, LogitsLoss, LossTerm, Match
from distill.objective import Objective
from distill.students import Student, StudentOptions, build_student, student_config
from distill.tasks import TASKS

MATCH = Match(build_layer_map(LayerMapOptions(), 2, 4), Logits.CLASSES)
TERMS: dict[str, LossTerm] = {
    "attention": AttentionLoss(),
    "hidden": HiddenLoss(weight=4),
    "logits": LogitsLoss(weight=0.5),
    "labels": LabelLoss(weight=0),
}


@pytest.fixture
def student(teacher: PreTrainedModel) -> Student:
    options = StudentOptions(layers=2, width=12, heads=2, intermediate_size=20, dropout=0.1)
    show_attention(teacher)
    task = TASKS["single_label_classification"]
    return build_student(student_config(teacher.config, options), task, options, 16, seed=0)


def test_norms_are_those_of_a_backward_pass_of_each_term_alone(
    student: Student, teacher: PreTrainedModel, batch: dict[str, Tensor]
) -> None:
    student.eval()
    objective = Objective(TERMS, MATCH)
    targets = capture(teacher, batch, objective.teacher_needs)
    norms = gradient_norms(student, targets, objective, batch, Accelerator())
    assert list(norms) == list(TERMS)
    for name, term in TERMS.items():
        student.zero_grad()
        # Weight 1 whatever is configured: norms are of the unweighted terms.
        alone = Objective({name: term}, MATCH)
        alone.values(student(batch, alone.student_needs), targets, batch)[name].backward()
        squares = [p.grad.double().square().sum() for p in student.model.parameters() if p.grad is not None]
        assert norms[name] == pytest.approx(math.sqrt(sum(squares)), rel=1e-5)


def test_measuring_leaves_gradients_and_random_numbers_alone(
    student: Student, teacher: PreTrainedModel, batch: dict[str, Tensor]
) -> None:
    student.train()  # with dropout
    objective = Objective(TERMS, MATCH)
    targets = capture(teacher, batch, objective.teacher_needs)
    state = torch.get_rng_state()
    gradient_norms(student, targets, objective, batch, Accelerator())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in student.parameters())


def test_shares_are_of_the_weighted_norms_and_sum_to_one() -> None:
    assert gradient_shares({"a": 2.0, "b": 1.0}, {"a": 1.0, "b": 6.0}) == {"a": 0.25, "b": 0.75}
    assert gradient_shares({"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 1.0}) == {"a": 0.0, "b": 0.0}


def test_balanced_shares_stand_as_the_configured_weights_and_the_sum_of_norms_stays() -> None:
    configured, norms = {"a": 1.0, "b": 3.0, "c": 1.0}, {"a": 100.0, "b": 0.02, "c": 5.0}
    balance = GradientBalance(configured)
    balance.add(norms)
    weights = balance.weights()
    shares = gradient_shares(norms, weights)
    assert shares == pytest.approx({"a": 0.2, "b": 0.6, "c": 0.2})
    before = sum(configured[name] * norm for name, norm in norms.items())
    assert sum(weights[name] * norm for name, norm in norms.items()) == pytest.approx(before)


def test_norms_are_averaged_geometrically_over_measurements() -> None:
    balance = GradientBalance({"a": 1.0, "b": 1.0})
    balance.add({"a": 1.0, "b": 1.0})
    balance.add({"a": 100.0, "b": 1.0})
    assert balance.norms == pytest.approx({"a": 100**0.3, "b": 1.0})


@pytest.mark.parametrize("norm", [0.0, math.nan, math.inf])
def test_a_term_that_cannot_be_measured_keeps_its_weight(norm: float) -> None:
    balance = GradientBalance({"a": 2.0, "b": 1.0, "off": 0.0})
    balance.add({"a": 4.0, "b": norm, "off": 1.0})
    assert balance.weights() == {"a": 2.0, "b": 1.0, "off": 0.0}


def test_before_a_measurement_weights_are_the_configured_ones() -> None:
    assert GradientBalance({"a": 2.0}).weights() == {"a": 2.0}


def test_a_restored_balance_goes_on_as_before() -> None:
    balance = GradientBalance({"a": 1.0, "b": 2.0})
    balance.add({"a": 3.0, "b": 0.5})
    restored = GradientBalance({"a": 1.0, "b": 2.0}, balance.norms)
    assert restored.weights() == balance.weights()
