"""The published TinyBERT step, written plainly and apart from the library: what speed is measured against.
That its losses are the published ones is tests/test_literal.py's.

float32; every row padded to one length; attention written out, every layer's full (B, H, T, T) map of scores kept;
both models run in every step of both phases. Sources: TinyBERT (arXiv 1909.10351); the published code's
task_distill.py and its modeling.py, whose quirks are kept: masked scores are set to 0 where they are below -100, means
run over padding, one projection with bias serves the embeddings and all layers, the cross-entropy is divided by the
classes, nothing has T^2. Dropout is whatever the models' mode makes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertForSequenceClassification, BertModel

MASKED = -10_000.0
"""Added to the scores of padded keys; below FLOOR they count as 0 in the loss."""
FLOOR = -100.0


@dataclass(frozen=True)
class Shown:
    """scores[i] (B, H, T, T) of layer i + 1, masked; states[i] (B, T, D), states[0] the embeddings' output."""

    scores: list[Tensor]
    states: list[Tensor]


def show(body: BertModel, batch: Mapping[str, Tensor]) -> Shown:
    """The encoder's forward pass, layer by layer."""
    mask = (1 - batch["attention_mask"][:, None, None, :].float()) * MASKED
    hidden = body.embeddings(input_ids=batch["input_ids"], token_type_ids=batch.get("token_type_ids"))
    scores, states = [], [hidden]
    for layer in body.encoder.layer:
        attention = layer.attention.self
        heads, width = attention.num_attention_heads, attention.attention_head_size
        query, key, value = (
            linear(hidden).unflatten(-1, (heads, width)).transpose(1, 2)
            for linear in (attention.query, attention.key, attention.value)
        )
        scores.append(query @ key.transpose(-1, -2) / math.sqrt(width) + mask)
        weights = attention.dropout(scores[-1].softmax(-1))
        context = (weights @ value).transpose(1, 2).flatten(2)
        attended = layer.attention.output(context, hidden)
        hidden = layer.output(layer.intermediate(attended), attended)
        states.append(hidden)
    return Shown(scores, states)


def attention_loss(student: Shown, teacher: Shown) -> Tensor:
    """Sum over student layers of the mean squared difference to every k-th layer's scores, k = N / M."""
    step = len(teacher.scores) // len(student.scores)
    loss = torch.zeros((), device=student.scores[0].device)
    for index, own in enumerate(student.scores):
        theirs = teacher.scores[index * step + step - 1]
        loss = loss + F.mse_loss(torch.where(own <= FLOOR, 0.0, own), torch.where(theirs <= FLOOR, 0.0, theirs))
    return loss


def hidden_loss(student: Shown, teacher: Shown, projection: nn.Linear) -> Tensor:
    """The same of the hidden states, the embeddings' output included, after the shared projection."""
    step = (len(teacher.states) - 1) // (len(student.states) - 1)
    loss = torch.zeros((), device=student.states[0].device)
    for index, own in enumerate(student.states):
        loss = loss + F.mse_loss(projection(own), teacher.states[index * step])
    return loss


def soft_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """-p_t log p_s, mean over batch and classes."""
    soft = (teacher_logits / temperature).softmax(-1)
    return -(soft * (student_logits / temperature).log_softmax(-1)).mean()


class Literal:
    """Both models and the optimizer; each call is one step. `projection` is (student width -> teacher width)."""

    def __init__(
        self,
        student: BertForSequenceClassification,
        teacher: BertForSequenceClassification,
        projection: nn.Linear,
        learning_rate: float,
    ) -> None:
        self.student, self.teacher, self.projection = student, teacher, projection
        parameters = [*student.parameters(), *projection.parameters()]
        decayed = [p for p in parameters if p.ndim > 1]
        others = [p for p in parameters if p.ndim == 1]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        # One tensor after another, as the published BertAdam goes.
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, foreach=False, fused=False)

    def intermediate_step(self, batch: Mapping[str, Tensor]) -> float:
        """Attention scores and hidden states."""
        own = show(self.student.bert, batch)
        with torch.no_grad():
            theirs = show(self.teacher.bert, batch)
        return self._take(attention_loss(own, theirs) + hidden_loss(own, theirs, self.projection))

    def logits_step(self, batch: Mapping[str, Tensor]) -> float:
        """The soft cross-entropy; as published, everything is shown in this phase too."""
        own = _logits(self.student, show(self.student.bert, batch))
        with torch.no_grad():
            theirs = _logits(self.teacher, show(self.teacher.bert, batch))
        return self._take(soft_cross_entropy(own, theirs))

    def _take(self, loss: Tensor) -> float:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def _logits(model: BertForSequenceClassification, shown: Shown) -> Tensor:
    logits: Tensor = model.classifier(model.dropout(model.bert.pooler(shown.states[-1])))
    return logits
