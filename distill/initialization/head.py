"""The student's first task head: the teacher's, read through the projection of the last layer.
Everything below the head is left to cut.py and copied.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.initialization.layout import LAYOUTS
from distill.students import Student


@torch.no_grad()
def adopt_head(student: Student, teacher: PreTrainedModel) -> None:
    """Give the student the teacher's task head, where both are of one family of LAYOUTS and on one device.

    With W h_s + c ~ h_t, a linear head C on hidden states becomes C W. A head C f(A h + b) of two layers (a pooler and
    a classifier, or RoBERTa's, ELECTRA's and DistilBERT's own) keeps the D_s of its D_t neurons whose outgoing weights
    are largest: rows of A W and columns of C, exact for those it keeps. Heads of other forms stay as they are.
    """
    family = teacher.config.model_type
    if family not in LAYOUTS or student.model.config.model_type != family:
        return
    source, target = _head(teacher), _head(student.model)
    if source is None or target is None:
        return
    weight, bias = _last_projection(student)
    linear, own = source[-1], target[-1]
    if len(source) == 1:
        own.weight.copy_(linear.weight.float() @ weight)
        own.bias.copy_(linear.bias + linear.weight.float() @ bias)
        return
    inner, own_inner = source[0], target[0]
    count = min(own_inner.out_features, inner.out_features)
    kept = linear.weight.float().norm(dim=0).topk(count).indices.sort().values
    own_inner.weight[:count] = (inner.weight.float() @ weight)[kept]
    own_inner.bias[:count] = (inner.bias + inner.weight.float() @ bias)[kept]
    own.weight[:, :count] = linear.weight[:, kept].to(own.weight.dtype)
    own.weight[:, count:] = 0
    own.bias.copy_(linear.bias)


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
