"""Building a student: its shape, its first weights, and the projections that carry its hidden states to the teacher's
width. Taking weights from the teacher is left to initialization/, training to training.py."""

from __future__ import annotations

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
from distill.families import Shape, inner_width, shaped_config
from distill.settings import UserError, settings
from distill.spelling import LAST, POSITIONS, own_inputs
from distill.tasks import TaskType
from distill.vocabulary import CutVocabulary, VocabularyOptions


@settings
class StudentOptions:
    family: str | None = None
    """Family of the student; where not given the teacher's own if students of it can be built, else bert (with
    embedding_width electra)."""
    layers: PositiveInt = 4
    """Encoder layers. TinyBERT4 has 4."""
    width: PositiveInt = 312
    """Hidden size; a multiple of heads."""
    heads: PositiveInt = 12
    """Attention heads; as many as the teacher's where attention scores are matched."""
    intermediate_size: PositiveInt = 1200
    """Inner width of the feed-forward blocks."""
    embedding_width: int | None = Field(default=None, ge=4)
    """Width of the embeddings where they are narrower than the layers, with one matrix between: more of the vocabulary
    for the same parameters. Where no family is given it is then electra (BERT's layers over such embeddings), of an
    albert teacher albert. null: as wide as the layers."""
    tokenizer: str | None = None
    """Tokenizer, a folder or hub name, where the student does not read the teacher's pieces. With another vocabulary
    only logits of whole sequences can be distilled."""
    vocabulary: VocabularyOptions | None = None
    """Cut the teacher's WordPiece vocabulary to the pieces of the training text, for instance {size: 5000}; see
    docs/vocabulary.md. null: the student has all of them."""
    initialization: str = "teacher"
    """teacher: cut out of the teacher's weights, in any shape, where both are of one family with BERT's layers (an
    electra also out of a bert); layers:
    the teacher's layers copied whole, at its width, heads and intermediate size; random; or a checkpoint of this very
    shape, folder or hub name."""
    projection: Literal["auto", "identity", "shared", "separate_embedding", "per_layer"] = "auto"
    """How hidden states reach the teacher's width. identity: not at all, widths must be equal; shared: one matrix for
    all layers and the embeddings (published code); separate_embedding: one for the embeddings, one for all layers
    (paper); per_layer: one for each; auto: identity at equal widths, else per_layer."""
    projection_bias: bool = False
    """Whether projections have a bias (published code: true)."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout of the student's hidden states and attention probabilities."""


def check_shape(options: StudentOptions) -> None:
    """Raises UserError where width is not a multiple of heads, or narrow embeddings are not narrow."""
    if options.width % options.heads:
        raise UserError(
            f"student.width: {options.width} is not a multiple of student.heads={options.heads}. Set a multiple."
        )
    if options.embedding_width is not None and options.embedding_width >= options.width:
        raise UserError(
            f"student.embedding_width: {options.embedding_width} is not below student.width={options.width}. Set less, "
            "or leave it out."
        )


def student_config(teacher: PreTrainedConfig, options: StudentOptions) -> PreTrainedConfig:
    """A config of the student's family and shape, with the teacher's vocabulary, positions and labels.

    Raises:
        UserError: a family or a shape of which no student can be built.
    """
    check_shape(options)
    shape = Shape(
        options.layers,
        options.width,
        options.heads,
        options.intermediate_size,
        options.dropout,
        options.embedding_width,
    )
    config = shaped_config(teacher, options.family, shape)
    config.architectures = None
    config._name_or_path = ""
    config.dtype = torch.float32
    return config


class Student(nn.Module):
    """A plain transformers model and the projections that only training needs.

    The projections are inside this module's forward, so that DDP sees and reduces their gradients; `model` is what is
    exported.

    With `vocabulary` the batches are in the teacher's pieces. The model reads its own spelling of them, where the batch
    holds one (see spelling.py), and is seen at the teacher's positions; else its own number of each piece, that of the
    unknown one where it has none.
    """

    to_student: Tensor | None

    def __init__(
        self, model: PreTrainedModel, projections: nn.ModuleDict, vocabulary: CutVocabulary | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.projections = projections
        self.vocabulary = vocabulary
        # Not persistent: it follows from the data, and a checkpoint is the same with and without it.
        self.register_buffer("to_student", None if vocabulary is None else vocabulary.to_student, persistent=False)

    def forward(self, batch: Mapping[str, Tensor], needs: Needs) -> Activations:
        """What `needs` names of the student, hidden states (B, T, teacher width)."""
        if spelt := own_inputs(batch):
            ends = batch[LAST] if hasattr(self.model, "qa_outputs") else None
            activations = capture(self.model, spelt, needs).at(batch[POSITIONS], ends)
        else:
            activations = capture(self.model, self.by_position(batch), needs)
        projected = {index: self.project(index, hidden) for index, hidden in activations.hidden.items()}
        return replace(activations, hidden=projected)

    def by_position(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A batch with the student's number of each of the teacher's pieces in its place."""
        if self.to_student is None:
            return batch
        return {**batch, "input_ids": self.to_student[batch["input_ids"]]}

    def own_rows(self, embeddings: Tensor) -> Tensor:
        """Of the teacher's word embeddings (N, D) those of the student's pieces (V, D), in its order."""
        return embeddings if self.vocabulary is None else embeddings[self.vocabulary.kept.to(embeddings.device)]

    def project(self, index: int, hidden: Tensor) -> Tensor:
        for name in (f"layer_{index}", "embedding" if index == 0 else "layers", "shared"):
            if name in self.projections:
                return self.projections[name](hidden)
        return hidden


def build_student(
    config: PreTrainedConfig,
    task: TaskType | None,
    options: StudentOptions,
    teacher_width: int,
    seed: int,
    vocabulary: CutVocabulary | None = None,
) -> Student:
    """A student with random weights, on the CPU in float32; the same for a seed on every process.

    Args:
        config: from `student_config`.
        task: None for an encoder alone (general distillation).
        vocabulary: where the student's is cut out of the teacher's, in whose pieces its batches come.

    Raises:
        UserError: identity projection between different widths; a family without a head for the task.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _fresh_model(config, AutoModel if task is None else task.auto_class)
        projections = _build_projections(options, config.num_hidden_layers, teacher_width)
    show_attention(model)
    return Student(model, projections, vocabulary)


def _fresh_model(config: PreTrainedConfig, auto_class: Any) -> PreTrainedModel:
    try:
        model: PreTrainedModel = auto_class.from_config(config)
    except ValueError as error:
        raise UserError(
            f"student.family: transformers has no {auto_class.__name__} of the family {config.model_type!r}. Set "
            "student.family=bert."
        ) from error
    return model


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

    A student of a cut vocabulary takes its rows of a checkpoint that has an embedding for each of the teacher's pieces.

    Raises:
        UserError: the shapes differ, or weights of the encoder are missing.
    """
    try:
        body, report = AutoModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"student.initialization: {source} cannot be read as a checkpoint: {str(error).splitlines()[0]} Give "
            "random, layers, teacher, or a checkpoint's folder or hub name."
        ) from error
    own: PreTrainedModel = student.model.base_model
    for name, given in _shape_of(body.config).items():
        wanted = _shape_of(own.config)[name]
        if given != wanted:
            raise UserError(
                f"student.initialization: {source} has {name}={given}, the student {wanted}. Make student.layers, "
                "width, heads and intermediate_size those of the checkpoint."
            )
    width, wanted = (model.get_input_embeddings().weight.shape[1] for model in (body, own))
    if width != wanted:
        raise UserError(
            f"student.initialization: {source} has embeddings {width} wide, the student {wanted}. Set "
            f"student.embedding_width={width if width < body.config.hidden_size else 'null'}."
        )
    weights = body.state_dict()
    if student.to_student is not None and body.config.vocab_size == len(student.to_student) != own.config.vocab_size:
        embeddings = body.get_input_embeddings().weight
        name = next(name for name, parameter in body.named_parameters() if parameter is embeddings)
        weights[name] = student.own_rows(weights[name])
    try:
        result: Any = own.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise UserError(
            f"student.initialization: {source} has other embeddings than the student: {str(error).splitlines()[-1]} "
            "Give a checkpoint with the teacher's vocabulary and positions."
        ) from error
    absent = {*report["missing_keys"], *result.missing_keys}
    missing = sorted(name for name in absent if not name.startswith("pooler."))
    if missing:
        raise UserError(
            f"student.initialization: {source} lacks the weights {', '.join(missing[:3])}. It is a "
            f"{body.config.model_type}, the student a {own.config.model_type}; give a checkpoint of the student's "
            "family."
        )


def _shape_of(config: PreTrainedConfig) -> dict[str, int | None]:
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    return {name: getattr(config, name, None) for name in names} | {"intermediate_size": inner_width(config)}
