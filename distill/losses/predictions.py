"""Terms on predictions: the teacher's logits and the true labels.
What a row of logits means is told by Match.logits."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from distill.activations import Activations, Needs
from distill.layer_map import LayerMap
from distill.losses.term import IGNORED, Batch, Logits, LossTerm, Match, masked_mean
from distill.settings import settings


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
            return masked_mean(divergence, mask)
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
            return masked_mean(errors, labels != IGNORED)
        if match.logits is Logits.SPAN:
            logits = logits.masked_fill(batch["attention_mask"].unsqueeze(-1) == 0, torch.finfo(torch.float32).min)
            return F.cross_entropy(logits, labels, reduction="none").mean(-1)
        return F.cross_entropy(logits, labels, reduction="none")


def _float_logits(activations: Activations) -> Tensor:
    if activations.logits is None:
        raise RuntimeError("the logits were not captured: needs() must ask for them")
    return activations.logits.float()
