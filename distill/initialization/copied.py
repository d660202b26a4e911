"""Copying the teacher's layers whole into a student of its width, as DistilBERT and Patient-KD begin.
Students of another width are left to cut.py."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from distill.families import inner_width
from distill.initialization.layout import alike
from distill.layer_map import LayerMap
from distill.settings import UserError
from distill.students import Student

_LAYER = re.compile(r"(.*?\blayers?\.)(\d+)(\..*)")
"""A weight of one layer: what stands before the layer's number, the number from 0, what stands behind it."""


def check_copy(teacher: PreTrainedConfig, student: PreTrainedConfig) -> None:
    """Raises UserError, with the settings that would do, where whole layers do not fit into the student."""
    remedy = "set student.initialization=teacher, which cuts a student of any shape"
    if student.model_type != teacher.model_type:
        other = remedy if alike(teacher.model_type, student.model_type) else "set student.initialization=random"
        raise UserError(
            f"student.initialization: layers of the family {teacher.model_type} cannot be copied into a student of the "
            f"family {student.model_type}. Instead {other}, or give a checkpoint."
        )
    shapes = {
        "width": (student.hidden_size, teacher.hidden_size),
        "heads": (student.num_attention_heads, teacher.num_attention_heads),
        "intermediate_size": (inner_width(student), inner_width(teacher)),
    }
    differing = {key: pair for key, pair in shapes.items() if pair[0] != pair[1]}
    if differing:
        raise UserError(
            "student.initialization: layers are copied whole, so the student's must be of the teacher's shape, but "
            f"{', '.join(f'student.{key} is {own} and the teacher has {its}' for key, (own, its) in differing.items())}"
            f". Set {', '.join(f'student.{key}={its}' for key, (_, its) in differing.items())}, or {remedy}."
        )
    embeddings = [getattr(config, "embedding_size", None) for config in (student, teacher)]
    if embeddings[0] != embeddings[1]:
        narrow = embeddings[1] < teacher.hidden_size
        setting = f"set student.embedding_width={embeddings[1]}" if narrow else "leave student.embedding_width out"
        raise UserError(
            f"student.initialization: the teacher's embeddings are {embeddings[1]} wide and not {embeddings[0]}, "
            f"so they cannot be copied. Instead {setting}, or {remedy}."
        )


@torch.no_grad()
def copy_layers(student: Student, teacher: PreTrainedModel, layer_map: LayerMap) -> None:
    """Fill `student` in place: the teacher's embeddings, the mapped layers (LayerMap.source), its task head.

    Projections between the equal widths, where the student has any, become the identity.

    Sources: DistilBERT (Sanh et al. 2019, sec. 3) takes every other layer; Patient-KD (Sun et al. 2019) the first ones,
    which is layer_map.strategy=bottom.

    Raises:
        UserError: see check_copy; or a layer that is built otherwise than the one it is mapped to (ModernBERT's first).
    """
    check_copy(teacher.config, student.model.config)
    own, weights = student.model.base_model.state_dict(), teacher.base_model.state_dict()
    sources = {name: _source(name, layer_map) for name in own}
    used = {layer_map.source(m) for m in range(1, layer_map.student_layers + 1)}
    wanted = {name for name in weights if _layer_of(name) in (None, *used)}
    unlike = sorted(name for name in wanted ^ set(sources.values()) if not name.startswith("pooler."))
    if unlike:
        raise UserError(
            f"student.initialization: teacher layers cannot be copied into layers that are built otherwise; only one "
            f"side has the weights {', '.join(unlike[:3])}. Map layers of one kind in layer_map.pairs, or set "
            "student.initialization=random."
        )
    words = student.model.get_input_embeddings().weight
    for name, tensor in own.items():
        if sources[name] in weights:
            weight = weights[sources[name]]
            tensor.copy_(student.own_rows(weight) if tensor.data_ptr() == words.data_ptr() else weight)
    for projection in student.projections.values():
        assert isinstance(projection, nn.Linear)
        nn.init.eye_(projection.weight)
        if projection.bias is not None:
            projection.bias.zero_()
    head = _head(teacher)
    for name, tensor in _head(student.model).items():
        if name in head:  # an encoder without a task teaches none
            tensor.copy_(head[name])


def _head(model: PreTrainedModel) -> dict[str, Tensor]:
    """What lies over the encoder; nothing where the model is one."""
    if model.base_model is model:
        return {}
    prefix = f"{model.base_model_prefix}."
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefix)}


def _layer_of(name: str) -> int | None:
    """The layer, from 1, that a weight belongs to; None where it belongs to none."""
    found = _LAYER.fullmatch(name)
    return int(found[2]) + 1 if found else None


def _source(name: str, layer_map: LayerMap) -> str:
    """The teacher's name for what one of the student's weights is copied from."""
    found = _LAYER.fullmatch(name)
    return f"{found[1]}{layer_map.source(int(found[2]) + 1) - 1}{found[3]}" if found else name
