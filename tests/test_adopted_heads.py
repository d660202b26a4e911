"""Claims about the task head that a student starts with: the teacher's, read through the projections."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from distill.activations import Needs, capture
from distill.initialization import adopt_head
from distill.students import Student, StudentOptions, build_student, student_config
from distill.tasks import TASKS
from tests.cut_students import build

HEADS = {
    "single_label_classification": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
    "question_answering": AutoModelForQuestionAnswering,
}


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
@pytest.mark.parametrize("task", HEADS)
def test_an_adopted_head_of_equal_width_is_the_teachers(family: str, task: str, build_model) -> None:
    labels = TASKS[task].num_labels("abc")
    teacher = build_model(family, HEADS[task], num_labels=labels)
    student = build(teacher, TASKS[task], layers=2)
    adopt_head(student, teacher)
    own, expected = student.model.state_dict(), teacher.state_dict()
    head = [name for name in expected if name.startswith(("classifier", "qa_outputs")) or "pooler" in name]
    assert head
    for name in head:
        torch.testing.assert_close(own[name], expected[name], msg=name)


@pytest.mark.parametrize("family", ["bert", "roberta"])
@torch.no_grad()
def test_an_adopted_head_reads_projected_states_and_keeps_the_neurons_that_count(
    family: str, build_model, fresh
) -> None:
    """It is the teacher's head on W h + c, with the neurons of the smallest outgoing weights silenced."""
    teacher = build_model(family)
    student = build(teacher, layers=2, width=12, projection_bias=True)
    for linear in student.projections.values():
        linear.bias.normal_()
    adopt_head(student, teacher)

    acts = student(fresh, Needs(hidden=frozenset({2}), logits=True))
    if family == "bert":
        inner, outer = teacher.bert.pooler.dense, teacher.classifier
    else:
        inner, outer = teacher.classifier.dense, teacher.classifier.out_proj
    silenced = outer.weight.norm(dim=0).argsort()[:4]
    neurons = torch.tanh(inner(acts.hidden[2][:, 0]))
    neurons[:, silenced] = 0
    torch.testing.assert_close(acts.logits, outer(neurons), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_electra_has_two_gelus_for_a_neuron_of_berts_pooler(teacher, fresh) -> None:
    """Of the pooler those with the largest outgoing weights, half as many as the student is wide, each within 0.11."""
    student = build(teacher, family="electra", layers=2, width=12, projection_bias=True)
    adopt_head(student, teacher)
    acts = student(fresh, Needs(hidden=frozenset({2}), logits=True))
    kept = teacher.classifier.weight.norm(dim=0).topk(6).indices
    neurons = torch.tanh(teacher.bert.pooler.dense(acts.hidden[2][:, 0]))[:, kept]
    expected = neurons @ teacher.classifier.weight[:, kept].T + teacher.classifier.bias
    bound = 0.11 * teacher.classifier.weight[:, kept].abs().sum(1)
    assert ((acts.logits - expected).abs() <= bound).all()
    assert (acts.logits - expected).abs().mean() < 0.3 * expected.std()


def test_a_bert_does_not_adopt_the_head_of_an_electra(build_model) -> None:
    """Its pooler's tanh is no GELU."""
    teacher = build_model("electra")
    student = build(teacher, family="bert")
    before = student.model.classifier.weight.clone()
    adopt_head(student, teacher)
    assert torch.equal(student.model.classifier.weight, before)


@torch.no_grad()
def test_distilberts_own_head_is_adopted(build_model, fresh) -> None:
    teacher = build_model("distilbert")
    student = build(teacher)
    adopt_head(student, teacher)
    student.model.distilbert.load_state_dict(teacher.distilbert.state_dict())
    needs = Needs(logits=True)
    assert torch.equal(student(fresh, needs).logits, capture(teacher, fresh, needs).logits)


def test_a_head_of_another_family_is_not_adopted(build_model, teacher) -> None:
    """DistilBERT's neurons are ReLUs, BERT's pooler has tanh."""
    student = Student(build_model("distilbert"), nn.ModuleDict())
    before = student.model.classifier.weight.clone()
    adopt_head(student, teacher)
    assert torch.equal(student.model.classifier.weight, before)


@torch.no_grad()
def test_an_adopted_tagger_reads_projected_states(build_model, fresh) -> None:
    teacher = build_model(auto_class=AutoModelForTokenClassification)
    student = build(teacher, TASKS["token_classification"], layers=2, width=12, projection_bias=True)
    student.projections["layer_2"].bias.normal_()
    adopt_head(student, teacher)
    acts = student(fresh, Needs(hidden=frozenset({2}), logits=True))
    torch.testing.assert_close(acts.logits, teacher.classifier(acts.hidden[2]), rtol=1e-4, atol=1e-5)


def test_an_encoder_alone_has_no_head_to_adopt(teacher) -> None:
    options = StudentOptions(layers=2, width=12, heads=2, intermediate_size=20)
    student = build_student(student_config(teacher.config, options), None, options, 16, 0)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    adopt_head(student, teacher)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
