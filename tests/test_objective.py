"""Claims about the weighted sum of loss terms, and about what it asks of the models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.activations import Needs, capture
from distill.attention import show_attention
from distill.layer_map import LayerMapOptions, build_layer_map
from distill.losses import (
    AttentionLoss,
    EmbeddingLoss,
    HiddenLoss,
    LabelLoss,
    Logits,
    LogitsLoss,
    LossTerm,
    Match,
    TaskLosses,
)
from distill.objective import LossReport, Objective
from distill.students import Student, StudentOptions, build_student, student_config
from distill.tasks import TASKS

MATCH = Match(build_layer_map(LayerMapOptions(), 2, 4), Logits.CLASSES)
EVERY_TERM: dict[str, LossTerm] = {
    **TaskLosses().intermediate(),
    **TaskLosses(labels=LabelLoss(weight=0.5)).prediction(),
}


@pytest.fixture
def student(teacher: PreTrainedModel) -> Student:
    options = StudentOptions(layers=2, width=12, heads=2, intermediate_size=20, dropout=0)
    task = TASKS["single_label_classification"]
    show_attention(teacher)
    return build_student(student_config(teacher.config, options), task, options, 16, seed=0)


def report_on(objective: Objective, student: Student, teacher: PreTrainedModel, batch: dict[str, Tensor]) -> LossReport:
    return objective(student(batch, objective.student_needs), capture(teacher, batch, objective.teacher_needs), batch)


def test_the_total_is_the_weighted_sum_of_the_parts(
    student: Student, teacher: PreTrainedModel, batch: dict[str, Tensor]
) -> None:
    terms: dict[str, LossTerm] = {
        "hidden": HiddenLoss(weight=0.25),
        "logits": LogitsLoss(weight=3),
        "labels": LabelLoss(),
    }
    report = report_on(Objective(terms, MATCH), student, teacher, batch)
    alone = {name: report_on(Objective({name: term}, MATCH), student, teacher, batch) for name, term in terms.items()}

    for name, part in report.parts.items():
        assert not part.requires_grad
        assert part.item() == pytest.approx(alone[name].parts[name].item(), rel=1e-6)
    parts = {name: part.item() for name, part in report.parts.items()}
    expected = 0.25 * parts["hidden"] + 3 * parts["logits"] + parts["labels"]
    assert report.total.item() == pytest.approx(expected, rel=1e-6)
    assert report.total.requires_grad


@pytest.mark.parametrize("parts", [[[0, 1, 2, 3]], [[0], [1], [2], [3]], [[3, 1], [0, 2]], [[2], [0, 1, 3]]])
def test_loss_and_gradient_are_means_over_examples_however_a_batch_is_split(
    student: Student, teacher: PreTrainedModel, batch: dict[str, Tensor], parts: list[list[int]]
) -> None:
    """Each part cut to its own longest row, as micro-batches and processes get them."""
    objective = Objective(EVERY_TERM, MATCH)
    whole = report_on(objective, student, teacher, batch)
    whole.total.backward()
    expected = [parameter.grad.clone() for parameter in student.parameters() if parameter.grad is not None]
    student.zero_grad()

    totals = []
    for rows in parts:
        length = int(batch["attention_mask"][rows].sum(-1).max())
        part = {name: tensor[rows] if tensor.ndim == 1 else tensor[rows, :length] for name, tensor in batch.items()}
        report = report_on(objective, student, teacher, part)
        report.total.backward()
        totals.append(report.total.item())
    got = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    assert sum(totals) == pytest.approx(whole.total.item(), rel=1e-5)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)


def test_a_row_of_weight_zero_only_fills_a_place(
    student: Student, teacher: PreTrainedModel, batch: dict[str, Tensor]
) -> None:
    objective = Objective(EVERY_TERM, MATCH)
    padded = {name: torch.cat((tensor, tensor[:1])) for name, tensor in batch.items()}
    padded["example_weight"][-1] = 0
    whole, filled = (report_on(objective, student, teacher, one).total.item() for one in (batch, padded))
    assert filled == pytest.approx(whole, rel=1e-6)


def test_needs_are_the_union_over_the_terms() -> None:
    objective = Objective({"embedding": EmbeddingLoss(), "attention": AttentionLoss(), "hidden": HiddenLoss()}, MATCH)
    assert objective.student_needs == Needs(hidden=frozenset({0, 1, 2}), attention=frozenset({1, 2}))
    assert objective.teacher_needs == Needs(hidden=frozenset({0, 2, 4}), attention=frozenset({2, 4}))
    assert objective.uses_teacher


def test_labels_alone_need_no_teacher() -> None:
    objective = Objective({"labels": LabelLoss()}, MATCH)
    assert not objective.uses_teacher
    assert objective.teacher_needs == Needs()
    assert objective.student_needs == Needs(logits=True)


def test_an_objective_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Objective({}, MATCH)


def test_the_head_does_not_run_where_no_logits_are_needed(
    student: Student, teacher: PreTrainedModel, batch: dict[str, Tensor]
) -> None:
    for model in (student.model, teacher):
        model.classifier.register_forward_hook(lambda *_: pytest.fail("the task head ran"))
    report_on(Objective(TaskLosses().intermediate(), MATCH), student, teacher, batch)
