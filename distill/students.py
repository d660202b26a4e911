"""Building a student: its shape, its first weights, and the projections that carry its hidden states to the teacher's
width. Cutting a student out of the teacher's weights is left to initialization.py, training to training.py."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from distill.activations import Activations, Needs, capture
from distill.attention import show_attention
from distill.settings import UserError, settings
from distill.tasks import TaskType

FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie")
"""Families whose config follows BERT's field names, so that a student of any shape is the teacher's config, changed."""


@settings
class StudentOptions:
    layers: PositiveInt = 4
    """Encoder layers. TinyBERT4 has 4."""
    width: PositiveInt = 312
    """Hidden size; a multiple of heads."""
    heads: PositiveInt = 12
    """Attention heads; as many as the teacher's where attention scores are matched."""
    intermediate_size: PositiveInt = 1200
    """Inner width of the feed-forward blocks."""
    initialization: str = "teacher"
    """random; teacher (cut out of the teacher's weights); or a checkpoint of this very shape, folder or hub name."""
    projection: Literal["auto", "identity", "shared", "separate_embedding", "per_layer"] = "auto"
    """How hidden states reach the teacher's width. identity: not at all, widths must be equal; shared: one matrix for
    all layers and the embeddings (published code); separate_embedding: one for the embeddings, one for all layers
    (paper); per_layer: one for each; auto: identity at equal widths, else per_layer."""
    projection_bias: bool = False
    """Whether projections have a bias (published code: true)."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout of the student's hidden states and attention probabilities."""


def check_shape(options: StudentOptions) -> None:
    """Raises UserError where width is not a multiple of heads."""
    if options.width % options.heads:
        raise UserError(
            f"student.width: {options.width} is not a multiple of student.heads={options.heads}. Set a multiple."
        )


def student_config(teacher: PreTrainedConfig, options: StudentOptions) -> PreTrainedConfig:
    """The teacher's config with the student's shape: same family, vocabulary, positions and labels."""
    check_shape(options)
    if teacher.model_type not in FAMILIES:
        raise UserError(
            f"teacher.model: no student of the family {teacher.model_type!r} can be built yet; supported are "
            f"{', '.join(FAMILIES)}."
        )
    config = copy.deepcopy(teacher)
    config.num_hidden_layers = options.layers
    config.hidden_size = options.width
    config.num_attention_heads = options.heads
    config.intermediate_size = options.intermediate_size
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = options.dropout
    if hasattr(config, "embedding_size"):  # ELECTRA
        config.embedding_size = options.width
    config.architectures = None
    config._name_or_path = ""
    config.dtype = torch.float32
    return config


class Student(nn.Module):
    """A plain transformers model and the projections that only training needs.

    The projections are inside this module's forward, so that DDP sees and reduces their gradients; `model` is what is
    exported.
    """

    def __init__(self, model: PreTrainedModel, projections: nn.ModuleDict) -> None:
        super().__init__()
        self.model = model
        self.projections = projections

    def forward(self, batch: Mapping[str, Tensor], needs: Needs) -> Activations:
        """What `needs` names of the student, hidden states (B, T, teacher width)."""
        activations = capture(self.model, batch, needs)
        projected = {index: self.project(index, hidden) for index, hidden in activations.hidden.items()}
        return replace(activations, hidden=projected)

    def project(self, index: int, hidden: Tensor) -> Tensor:
        for name in (f"layer_{index}", "embedding" if index == 0 else "layers", "shared"):
            if name in self.projections:
                return self.projections[name](hidden)
        return hidden


def build_student(
    config: PreTrainedConfig, task: TaskType | None, options: StudentOptions, teacher_width: int, seed: int
) -> Student:
    """A student with random weights, on the CPU in float32; the same for a seed on every process.

    Args:
        config: from `student_config`.
        task: None for an encoder alone (general distillation).

    Raises:
        UserError: identity projection between different widths.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(config) if task is None else task.auto_class.from_config(config)
        projections = _build_projections(options, config.num_hidden_layers, teacher_width)
    show_attention(model)
    return Student(model, projections)


def _build_projections(options: StudentOptions, layers: int, teacher_width: int) -> nn.ModuleDict:
    kind = options.projection
    if kind == "auto":
        kind = "identity" if options.width == teacher_width else "per_layer"
    if kind == "identity":
        if options.width != teacher_width:
            raise UserError(
                f"student.projection: identity needs equal widths, but the student is {options.width} wide and the "
                f"teacher {teacher_width}. Set student.projection to auto."
            )
        return nn.ModuleDict()
    names = {
        "shared": ["shared"],
        "separate_embedding": ["embedding", "layers"],
        "per_layer": [f"layer_{index}" for index in range(layers + 1)],
    }[kind]
    return nn.ModuleDict(
        {name: nn.Linear(options.width, teacher_width, bias=options.projection_bias) for name in names}
    )


def load_body(student: Student, source: str | Path) -> None:
    """Take the encoder's weights from a checkpoint of the same shape; the task head stays as it is.

    Raises:
        UserError: the shapes differ, or weights of the encoder are missing.
    """
    try:
        body, report = AutoModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"student.initialization: {source} cannot be read as a checkpoint: {str(error).splitlines()[0]} Give "
            "random, teacher, or a checkpoint's folder or hub name."
        ) from error
    own: PreTrainedModel = student.model.base_model
    for field in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"):
        if getattr(body.config, field, None) != getattr(own.config, field):
            raise UserError(
                f"student.initialization: {source} has {field}={getattr(body.config, field, None)}, the student "
                f"{getattr(own.config, field)}. Make student.layers, width, heads and intermediate_size those of the "
                "checkpoint."
            )
    try:
        result: Any = own.load_state_dict(body.state_dict(), strict=False)
    except RuntimeError as error:
        raise UserError(
            f"student.initialization: {source} has other embeddings than the student: {str(error).splitlines()[-1]} "
            "Give a checkpoint with the teacher's vocabulary and positions."
        ) from error
    absent = {*report["missing_keys"], *result.missing_keys}
    missing = sorted(name for name in absent if not name.startswith("pooler."))
    if missing:
        raise UserError(f"student.initialization: {source} lacks the weights {', '.join(missing[:3])}.")
