"""One class per loss term between a teacher and a student; the groups of them at the bottom.
What the activations are is left to activations.py, the weighted sum to objective.py.

Every term returns one float32 value an example, (B,): a mean over that example's own valid positions. A batch's loss
is then a plain mean over examples, so that it depends neither on padding nor on how examples are spread over batches,
accumulation steps and processes.

Letters: B examples, T tokens, H heads, d head width, D teacher width, C classes, n tokens that are not padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from distill.activations import Activations, Needs
from distill.attention import AttentionInputs
from distill.layer_map import LayerMap
from distill.settings import UserError, settings

Batch = Mapping[str, Tensor]
IGNORED = -100
"""The label of a position that carries none (transformers' own convention)."""


class Logits(Enum):
    """What a row of logits stands for; it decides the softmax, the sigmoid or the plain difference."""

    CLASSES = "one of C classes, (B, C)"
    BINARIES = "C yes-or-no labels, (B, C)"
    VALUE = "a number, (B, 1)"
    TOKEN_CLASSES = "one of C classes a token, (B, T, C)"
    SPAN = "the first and the last token of an answer, (B, T, 2)"


@dataclass(frozen=True)
class Match:
    """What stands opposite what: the layer map, and the meaning of the logits."""

    layers: LayerMap
    logits: Logits


@settings
class LossTerm:
    weight: NonNegativeFloat = 1.0
    """Factor of this term in the objective."""

    uses_teacher: ClassVar[bool] = True

    def needs(self, layers: LayerMap) -> tuple[Needs, Needs]:
        """What the term asks of the student and of the teacher."""
        raise NotImplementedError

    def __call__(self, student: Activations, teacher: Activations, batch: Batch, match: Match) -> Tensor:
        """The term's value for each example, (B,) float32."""
        raise NotImplementedError


@settings
class EmbeddingLoss(LossTerm):
    """Mean squared error of the embedding outputs.

    L = mean over n tokens and D of (E_s W - E_t)^2, E the output of the embeddings (after their LayerNorm), W the
    student's projection, already applied by the student. Shapes (B, T, D).
    Source: TinyBERT (arXiv 1909.10351), eq. 9. The published code shares W with the hidden states:
    student.projection=shared.
    """

    padding: Literal["masked", "included"] = "masked"
    """included: average over padded positions too, as the published code does."""

    def needs(self, layers: LayerMap) -> tuple[Needs, Needs]:
        return Needs(hidden=frozenset({0})), Needs(hidden=frozenset({0}))

    def __call__(self, student: Activations, teacher: Activations, batch: Batch, match: Match) -> Tensor:
        return _hidden_error(student.hidden[0], teacher.hidden[0], _positions(batch, self.padding))


@settings
class HiddenLoss(LossTerm):
    """Mean squared error of the hidden states of mapped layers, summed over the pairs.

    L = sum over pairs (m, g) of mean over n tokens and D of (H_s^m W - H_t^g)^2. Shapes (B, T, D).
    Source: TinyBERT (arXiv 1909.10351), eq. 8.
    """

    padding: Literal["masked", "included"] = "masked"
    """included: average over padded positions too, as the published code does."""

    def needs(self, layers: LayerMap) -> tuple[Needs, Needs]:
        students, teachers = (frozenset(side) for side in zip(*layers.hidden, strict=True))
        return Needs(hidden=students), Needs(hidden=teachers)

    def __call__(self, student: Activations, teacher: Activations, batch: Batch, match: Match) -> Tensor:
        positions = _positions(batch, self.padding)
        errors = [_hidden_error(student.hidden[m], teacher.hidden[g], positions) for m, g in match.layers.hidden]
        return torch.stack(errors).sum(0)


@settings
class AttentionLoss(LossTerm):
    """Mean squared error of the attention scores before the softmax, summed over the pairs.

    L = sum over pairs (m, g) of mean over H heads and n x n (query, key) pairs of (A_s^m - A_t^g)^2,
    A = Q K' / sqrt(d). One matrix product gives the difference itself:
    [Q_s / sqrt(d_s), -Q_t / sqrt(d_t)] [K_s, K_t]', rows of padding zeroed before it. Shapes (B, H, T, d).
    Needs as many heads in the student as in the teacher.
    Source: TinyBERT (arXiv 1909.10351), eq. 7.
    """

    padding: Literal["masked", "included"] = "masked"
    """included: padded queries count against real keys and the mean is over all T x T, as in the published code."""

    def needs(self, layers: LayerMap) -> tuple[Needs, Needs]:
        students, teachers = (frozenset(side) for side in zip(*layers.attention, strict=True))
        return Needs(attention=students), Needs(attention=teachers)

    def __call__(self, student: Activations, teacher: Activations, batch: Batch, match: Match) -> Tensor:
        keys = batch["attention_mask"]
        queries = _positions(batch, self.padding)
        columns = keys if self.padding == "masked" else torch.ones_like(keys)
        pairs = queries.sum(-1).float() * columns.sum(-1).float()
        errors = []
        for m, g in match.layers.attention:
            difference = _score_difference(student.attention[m], teacher.attention[g], queries, keys)
            heads = difference.shape[1]
            errors.append(difference.float().square().sum((1, 2, 3)) / (heads * pairs.clamp(min=1)))
        return torch.stack(errors).sum(0)


@settings
class LogitsLoss(LossTerm):
    """Divergence of the student's predictions from the teacher's.

    classes, tokens, spans   KL: T^2 sum_c p_t log(p_t / p_s), p = softmax(z / T); tokens averaged over the n tokens,
                             spans over start and end with the softmax over tokens. Cross-entropy has the same
                             gradient; KL reaches 0.
    yes-or-no labels         the same for Bernoulli variables, mean over C
    numbers                  (z_s - z_t)^2, the temperature unused
    T * T keeps the gradient's size independent of T (Hinton 2015, arXiv 1503.02531, sec. 2).
    Shapes: see `Logits`. Source: TinyBERT (arXiv 1909.10351), eq. 10, with T = 1.
    """

    temperature: float = Field(default=1.0, gt=0)
    """T above; larger values soften both distributions."""
    form: Literal["kl", "published"] = "kl"
    """published: cross-entropy without T^2, divided by the C classes as well, as the published code computes it."""

    def needs(self, layers: LayerMap) -> tuple[Needs, Needs]:
        return Needs(logits=True), Needs(logits=True)

    def __call__(self, student: Activations, teacher: Activations, batch: Batch, match: Match) -> Tensor:
        student_logits, teacher_logits = _float_logits(student), _float_logits(teacher)
        if match.logits is Logits.VALUE:
            return (student_logits - teacher_logits).square().mean(-1)
        mask = batch["attention_mask"]
        student_logits, teacher_logits = student_logits / self.temperature, teacher_logits / self.temperature
        if match.logits is Logits.BINARIES:
            return self._binary(student_logits, teacher_logits)
        if match.logits is Logits.SPAN:
            outside = mask.unsqueeze(-1) == 0
            lowest = torch.finfo(torch.float32).min
            student_logits = student_logits.masked_fill(outside, lowest).transpose(1, 2)
            teacher_logits = teacher_logits.masked_fill(outside, lowest).transpose(1, 2)
        classes = mask.sum(-1, keepdim=True) if match.logits is Logits.SPAN else student_logits.shape[-1]
        divergence = self._categorical(student_logits, teacher_logits, classes)
        if match.logits is Logits.SPAN:
            return divergence.mean(-1)
        if match.logits is Logits.TOKEN_CLASSES:
            return _masked_mean(divergence, mask)
        return divergence

    def _categorical(self, student_logits: Tensor, teacher_logits: Tensor, classes: int | Tensor) -> Tensor:
        student_log, teacher_log = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
        if self.form == "published":
            return -(teacher_log.exp() * student_log).sum(-1) / classes
        divergence = F.kl_div(student_log, teacher_log, reduction="none", log_target=True).sum(-1)
        return divergence * self.temperature**2

    def _binary(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        teacher_yes = teacher_logits.sigmoid()
        cross_entropy = F.binary_cross_entropy_with_logits(student_logits, teacher_yes, reduction="none").mean(-1)
        if self.form == "published":
            return cross_entropy
        entropy = F.binary_cross_entropy_with_logits(teacher_logits, teacher_yes, reduction="none").mean(-1)
        return (cross_entropy - entropy) * self.temperature**2


@settings
class LabelLoss(LossTerm):
    """The task's own loss on the true labels; no teacher.

    classes           cross-entropy -log p(label)
    yes-or-no labels  binary cross-entropy, mean over C
    numbers           (z - label)^2
    tokens            cross-entropy, mean over the tokens that carry a label
    spans             cross-entropy over tokens, mean of start and end
    """

    uses_teacher: ClassVar[bool] = False

    def needs(self, layers: LayerMap) -> tuple[Needs, Needs]:
        return Needs(logits=True), Needs()

    def __call__(self, student: Activations, teacher: Activations, batch: Batch, match: Match) -> Tensor:
        logits, labels = _float_logits(student), batch["labels"]
        if match.logits is Logits.VALUE:
            return (logits.squeeze(-1) - labels.float()).square()
        if match.logits is Logits.BINARIES:
            return F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").mean(-1)
        if match.logits is Logits.TOKEN_CLASSES:
            errors = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
            return _masked_mean(errors, labels != IGNORED)
        if match.logits is Logits.SPAN:
            logits = logits.masked_fill(batch["attention_mask"].unsqueeze(-1) == 0, torch.finfo(torch.float32).min)
            return F.cross_entropy(logits, labels, reduction="none").mean(-1)
        return F.cross_entropy(logits, labels, reduction="none")


@settings
class GeneralLosses:
    """Terms of general distillation by name; the name is the key in a config and in the log. null switches one off."""

    embedding: EmbeddingLoss | None = field(default_factory=EmbeddingLoss)
    attention: AttentionLoss | None = field(default_factory=AttentionLoss)
    hidden: HiddenLoss | None = field(default_factory=HiddenLoss)

    def intermediate(self) -> dict[str, LossTerm]:
        """The terms on layers that are on, by name."""
        return self._on("embedding", "attention", "hidden")

    def _on(self, *names: str) -> dict[str, LossTerm]:
        return {name: term for name in names if (term := getattr(self, name)) is not None}


@settings
class TaskLosses(GeneralLosses):
    """Terms of task distillation by name: those of the intermediate phase, and logits and labels after it."""

    logits: LogitsLoss | None = field(default_factory=LogitsLoss)
    labels: LabelLoss | None = None

    def prediction(self) -> dict[str, LossTerm]:
        """The terms on predictions that are on, by name."""
        return self._on("logits", "labels")


def check_heads(losses: GeneralLosses, key: str, student_heads: int, teacher_heads: int) -> None:
    """Refuse an attention loss between models whose heads cannot be paired.

    Args:
        key: where the losses stand in the config, `task.losses` or `general.losses`.

    Raises:
        UserError: the attention loss is on and the head counts differ.
    """
    if losses.attention is not None and student_heads != teacher_heads:
        raise UserError(
            f"student.heads: {student_heads}, but the teacher has {teacher_heads} and {key}.attention compares scores "
            f"head by head. Set student.heads={teacher_heads}, or {key}.attention=null."
        )


def _positions(batch: Batch, padding: str) -> Tensor:
    mask = batch["attention_mask"]
    return mask if padding == "masked" else torch.ones_like(mask)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of (B, T) values over each row's valid positions; a row with none gives 0."""
    weights = mask.to(values.dtype)
    return (values * weights).sum(-1) / weights.sum(-1).clamp(min=1)


def _hidden_error(student: Tensor, teacher: Tensor, positions: Tensor) -> Tensor:
    return _masked_mean((student.float() - teacher.float()).square().mean(-1), positions)


def _score_difference(student: AttentionInputs, teacher: AttentionInputs, queries: Tensor, keys: Tensor) -> Tensor:
    """A_s - A_t, (B, H, T, T), zero where a query or a key is masked."""
    dtype = student.query.dtype
    query_mask = queries[:, None, :, None].to(dtype)
    key_mask = keys[:, None, :, None].to(dtype)
    query = torch.cat((student.query * student.scaling, teacher.query.to(dtype) * -teacher.scaling), dim=-1)
    key = torch.cat((student.key, teacher.key.to(dtype)), dim=-1)
    return torch.matmul(query * query_mask, (key * key_mask).transpose(-1, -2))


def _float_logits(activations: Activations) -> Tensor:
    if activations.logits is None:
        raise RuntimeError("the logits were not captured: needs() must ask for them")
    return activations.logits.float()
