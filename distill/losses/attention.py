"""Terms on self-attention: scores, probabilities, and relations among queries, keys or values.
How queries, keys and values come to be seen is left to the attention function in distill/attention.py."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor
from transformers import PreTrainedConfig

from distill.activations import Activations, Needs
from distill.attention import AttentionInputs, why_unseen
from distill.layer_map import LayerMap
from distill.losses.score_error import score_error
from distill.losses.term import Batch, LossTerm, Match, Padding, masked_mean, positions
from distill.settings import UserError, settings

MOST_RELATION_HEADS = 48
"""MiniLMv2's number for widths of 768 and 1024."""


class _OnAttention(LossTerm):
    """A term on the layers of the attention map."""

    def needs(self, layers: LayerMap) -> tuple[Needs, Needs]:
        students, teachers = (frozenset(side) for side in zip(*layers.attention, strict=True))
        return Needs(attention=students), Needs(attention=teachers)

    def check(self, key: str, student: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
        if (reason := why_unseen(teacher)) is not None:
            raise UserError(
                f"{key}: it needs the teacher's attention, which cannot be seen: {reason}. Set {key}=null, or give "
                "another teacher (teacher.model)."
            )


@settings
class AttentionLoss(_OnAttention):
    """Difference of the attention maps of mapped layers, summed over the pairs (m, g).

    A = Q K' / sqrt(d) are the scores before the softmax.
    scores         L = sum over pairs of mean over H heads and n x n (query, key) pairs of (A_s^m - A_t^g)^2.
                   See score_error.py for how it is computed.
    probabilities  L = sum over pairs of mean over H heads and n queries of KL(p_t || p_s), p = softmax of A over the
                   n keys.
    With heads: averaged, A and p are their means over the heads of each model, so that head counts may differ.
    Shapes (B, H, T, d).
    Where a layer of either model attends within a window alone (ModernBERT's local layers), only the pairs that both
    attend to count, in the means and in the softmaxes. Terms of relative position that a family adds to its scores
    (DeBERTa, MPNet) are not in A, see AttentionInputs: there p is the softmax of the content scores.
    Source: scores: TinyBERT (arXiv 1909.10351), eq. 7; probabilities: MiniLM (arXiv 2002.10957), eq. 4.
    """

    compare: Literal["scores", "probabilities"] = "scores"
    """scores before the softmax (TinyBERT), or probabilities after it (MiniLM)."""
    heads: Literal["paired", "averaged"] = "paired"
    """paired: head i with head i, the counts must be equal; averaged: the mean over heads."""
    padding: Padding = "masked"
    """included, for scores: padded queries count against real keys and the mean is over all T x T, as in the
    published code."""

    def check(self, key: str, student: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
        super().check(key, student, teacher)
        if self.compare == "probabilities" and self.padding == "included":
            raise UserError(f"{key}.padding: included exists for compare=scores alone. Set {key}.padding=masked.")
        if self.heads == "paired" and student.num_attention_heads != teacher.num_attention_heads:
            raise UserError(
                f"student.heads: {student.num_attention_heads}, but the teacher has {teacher.num_attention_heads} and "
                f"{key} compares head by head. Set student.heads={teacher.num_attention_heads}; or {key}=null, with "
                f"{key.rpartition('.')[0]}.relations={{}} in its place, which needs no equal heads; or "
                f"{key}.heads=averaged."
            )

    def __call__(self, student: Activations, teacher: Activations, batch: Batch, match: Match) -> Tensor:
        errors = []
        for m, g in match.layers.attention:
            pair = student.attention[m], teacher.attention[g]
            compare = self._score_error if self.compare == "scores" else self._divergence
            errors.append(compare(*pair, batch))
        return torch.stack(errors).sum(0)

    def _score_error(self, student: AttentionInputs, teacher: AttentionInputs, batch: Batch) -> Tensor:
        if self.heads == "averaged":
            student, teacher = _head_mean(student), _head_mean(teacher)
        queries = positions(batch, self.padding)
        visible = _visible_to_both(student, teacher)
        if visible is None:
            pairs = queries.sum(-1).float().square()
        else:
            pairs = ((queries.float() @ visible.float()) * queries).sum(-1)
        own, given = ((side.query, side.key, side.scaling) for side in (student, teacher))
        error = score_error(own, given, queries, batch["attention_mask"], visible)
        return error / (student.query.shape[1] * pairs.clamp(min=1))

    def _divergence(self, student: AttentionInputs, teacher: AttentionInputs, batch: Batch) -> Tensor:
        keys = batch["attention_mask"]
        visible = _visible_to_both(student, teacher)
        logs = [_log_probabilities(side.scores(), keys, visible) for side in (student, teacher)]
        if self.heads == "averaged":
            logs = [log.logsumexp(1, keepdim=True) - math.log(log.shape[1]) for log in logs]
        return _map_divergence(logs[0], logs[1], keys)


@settings
class RelationLoss(_OnAttention):
    """Divergence of self-attention relations of mapped layers; head counts and widths may differ.

    Of the queries, keys or values X of all heads, (B, T, H d), cut anew into R relation heads of width r:
    L = sum over pairs (m, g) and over the named relations of mean over R heads and n queries of KL(p_t || p_s),
    p = softmax over the n keys of X X' / sqrt(r). A window of attention does not narrow them: they relate what the
    layer computes for every position, not what a position attends to.
    Source: MiniLMv2 (arXiv 2012.15828), eq. 4 to 7; with relations: [value] and R the attention heads, MiniLM's value
    relation (arXiv 2002.10957), eq. 5 and 6. Both take one pair, the last student layer from the last teacher layer
    (upper middle for large teachers): layer_map.attention_pairs=[[M, N]].
    """

    relations: tuple[Literal["query", "key", "value"], ...] = ("query", "key", "value")
    """Which of Q-Q, K-K and V-V are compared."""
    relation_heads: PositiveInt | None = None
    """R; a divisor of both models' attention widths. Where not given, the largest one up to 48."""

    def check(self, key: str, student: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
        super().check(key, student, teacher)
        widths = _attention_width(student), _attention_width(teacher)
        if not self.relations or len(set(self.relations)) < len(self.relations):
            raise UserError(f"{key}.relations: name query, key and value, each at most once, and at least one.")
        if self.relation_heads is not None and any(width % self.relation_heads for width in widths):
            raise UserError(
                f"{key}.relation_heads: {self.relation_heads} does not divide both the student's width {widths[0]} and "
                f"the teacher's {widths[1]}. Set a divisor of {math.gcd(*widths)}."
            )

    def needs(self, layers: LayerMap) -> tuple[Needs, Needs]:
        student, teacher = super().needs(layers)
        values = Needs(values="value" in self.relations)
        return student | values, teacher | values

    def __call__(self, student: Activations, teacher: Activations, batch: Batch, match: Match) -> Tensor:
        keys = batch["attention_mask"]
        errors = []
        for m, g in match.layers.attention:
            for name in self.relations:
                pair = getattr(student.attention[m], name), getattr(teacher.attention[g], name)
                heads = self.relation_heads or _relation_heads(*(x.shape[1] * x.shape[3] for x in pair))
                student_log, teacher_log = (_log_probabilities(_relation(x, heads), keys) for x in pair)
                errors.append(_map_divergence(student_log, teacher_log, keys))
        return torch.stack(errors).sum(0)


def _relation_heads(student_width: int, teacher_width: int) -> int:
    """The largest divisor of both widths that is at most MOST_RELATION_HEADS."""
    common = math.gcd(student_width, teacher_width)
    return max(r for r in range(1, MOST_RELATION_HEADS + 1) if common % r == 0)


def _attention_width(config: PreTrainedConfig) -> int:
    """Width of all heads together; MobileBERT's attention works inside its bottleneck."""
    return getattr(config, "true_hidden_size", None) or config.hidden_size


def _relation(x: Tensor, heads: int) -> Tensor:
    """X X' / sqrt(r) of (B, H, T, d) cut anew into `heads`: (B, heads, T, T)."""
    split = x.transpose(1, 2).flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2)
    return torch.matmul(split, split.transpose(-1, -2)) / math.sqrt(split.shape[-1])


def _head_mean(inputs: AttentionInputs) -> AttentionInputs:
    """One head whose scores are the mean of all heads': their queries and keys side by side, scaled by 1 / H."""
    query, key = (x.transpose(1, 2).flatten(2).unsqueeze(1) for x in (inputs.query, inputs.key))
    return AttentionInputs(query, key, inputs.value, inputs.scaling / inputs.query.shape[1], inputs.window)


def _visible_to_both(student: AttentionInputs, teacher: AttentionInputs) -> Tensor | None:
    """(T, T) bool, the pairs within both windows; None where neither leaves any out."""
    own, given = student.visible(), teacher.visible()
    if own is None or given is None:
        return given if own is None else own
    return own & given


def _log_probabilities(scores: Tensor, keys: Tensor, visible: Tensor | None = None) -> Tensor:
    """Log softmax over the valid keys, of those only the visible ones, float32; others get (almost) no probability."""
    hidden = keys[:, None, None, :] == 0
    if visible is not None:
        hidden = hidden | ~visible
    return scores.float().masked_fill(hidden, torch.finfo(torch.float32).min).log_softmax(-1)


def _map_divergence(student_log: Tensor, teacher_log: Tensor, queries: Tensor) -> Tensor:
    """Mean over heads and valid queries of KL(p_t || p_s), (B,), of log probabilities (B, H, T, T)."""
    divergence = F.kl_div(student_log, teacher_log, reduction="none", log_target=True).sum(-1)
    return masked_mean(divergence.mean(1), queries)
