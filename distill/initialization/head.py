"""The student's first task head: the teacher's, read through the projection of the last layer.
Everything below the head is left to cut.py and copied.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.initialization.layout import alike
from distill.students import Student

_SAME = ((1.0, 0.0, 1.0, 0.0),)
"""Of each neuron f that stands for one of the teacher's, (slope, shift, factor, constant): the sum over them of
factor f(slope x + shift) + constant is what the teacher's gives for x."""
_TANH = ((1.5, 2.35, 1 / 2.35, -0.5), (1.5, -2.35, -1 / 2.35, -0.5))
"""The same where f is GELU and the teacher's is tanh, to 0.11."""


@torch.no_grad()
def adopt_head(student: Student, teacher: PreTrainedModel) -> None:
    """Give the student the teacher's task head, where their layers are alike and both are on one device.

    With W h_s + c ~ h_t, a linear head C on hidden states becomes C W. A head C f(A h + b) of two layers (a pooler and
    a classifier, or RoBERTa's, ELECTRA's and DistilBERT's own) keeps the D_s of its D_t neurons whose outgoing weights
    are largest: rows of A W and columns of C, exact for those it keeps. An ELECTRA has GELUs where its BERT teacher's
    pooler has tanh: two of them stand for one neuron, to 0.11 of its outgoing weight. Heads of other forms stay as
    they are.
    """
    family, own_family = teacher.config.model_type, student.model.config.model_type
    source, target = _head(teacher), _head(student.model)
    if not alike(family, own_family) or source is None or target is None:
        return
    weight, bias = _last_projection(student)
    linear, own = source[-1], target[-1]
    if len(source) == 1:
        own.weight.copy_(linear.weight.float() @ weight)
        own.bias.copy_(linear.bias + linear.weight.float() @ bias)
        return
    if family != own_family != "electra":
        return  # BERT's pooler has no GELU
    inner, own_inner = source[0], target[0]
    turns = _SAME if family == own_family else _TANH
    count = min(own_inner.out_features // len(turns), inner.out_features)
    kept = linear.weight.float().norm(dim=0).topk(count).indices.sort().values
    own.weight.zero_()
    own.bias.copy_(linear.bias)
    for turn, (slope, shift, factor, constant) in enumerate(turns):
        rows = slice(turn * count, (turn + 1) * count)
        own_inner.weight[rows] = slope * (inner.weight.float() @ weight)[kept]
        own_inner.bias[rows] = slope * (inner.bias + inner.weight.float() @ bias)[kept] + shift
        own.weight[:, rows] = factor * linear.weight[:, kept].to(own.weight.dtype)
        own.bias.add_(constant * linear.weight[:, kept].sum(1))


def _head(model: PreTrainedModel) -> list[nn.Linear] | None:
    """The one or two linear layers of a task head, from the hidden states up."""
    head = getattr(model, "classifier", getattr(model, "qa_outputs", None))
    below = getattr(model, "pre_classifier", getattr(getattr(model.base_model, "pooler", None), "dense", None))
    if isinstance(head, nn.Linear):
        return [head] if below is None else [below, head]
    if head is not None and hasattr(head, "dense") and hasattr(head, "out_proj"):
        return [head.dense, head.out_proj]
    return None


def _last_projection(student: Student) -> tuple[Tensor, Tensor]:
    """W (D_t, D_s) and c (D_t,); the identity and zero where there is no projection."""
    size = student.model.config.hidden_size
    eye = torch.eye(size, device=student.model.device)
    last = student.model.config.num_hidden_layers
    bias = student.project(last, torch.zeros_like(eye[0]))
    return (student.project(last, eye) - bias).T, bias
