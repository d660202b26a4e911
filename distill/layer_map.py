"""Which teacher layer teaches which student layer; owns every off-by-one.
What is compared between the layers is left to losses/.

Two index spaces stay apart everywhere:
    attention   layers count from 1 to L; layer m's scores come from its m-th self-attention
    hidden      0 is the output of the embeddings, m the output of layer m
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import PositiveInt

from distill.settings import UserError, settings

Pairs = tuple[tuple[int, int], ...]


@settings
class LayerMapOptions:
    strategy: Literal["uniform", "top", "bottom", "last"] = "uniform"
    """uniform: layer m of M learns from round(m N / M) (TinyBERT's g(m) = k m where M divides N); top: from the last
    M teacher layers; bottom: from the first M; last: only the last student layer, from the last teacher layer."""
    pairs: list[tuple[PositiveInt, PositiveInt]] | None = None
    """Explicit [student layer, teacher layer] pairs, layers counted from 1; replaces the strategy."""
    attention_pairs: list[tuple[PositiveInt, PositiveInt]] | None = None
    """As pairs, for the attention losses alone."""
    hidden_pairs: list[tuple[PositiveInt, PositiveInt]] | None = None
    """As pairs, for the hidden-state losses alone (the embeddings are matched by a loss of their own)."""


@dataclass(frozen=True)
class LayerMap:
    """Pairs of (student layer, teacher layer), counted from 1."""

    attention: Pairs
    hidden: Pairs
    student_layers: int
    teacher_layers: int

    def source(self, student_layer: int) -> int:
        """The teacher layer that a student layer's first weights come from: its hidden states' partner, else its
        attention's; where the map names neither, the nearest in proportion."""
        partner = {**dict(self.attention), **dict(self.hidden)}.get(student_layer)
        return partner or nearest_layer(student_layer, self.student_layers, self.teacher_layers)

    def describe(self) -> str:
        """The map for people, e.g. `student 1 2 3 <- teacher 2 4 6`; both maps where they differ."""

        def one(pairs: Pairs) -> str:
            students = " ".join(str(student) for student, _ in pairs)
            return f"student {students} <- teacher {' '.join(str(teacher) for _, teacher in pairs)}"

        if self.attention == self.hidden:
            return one(self.attention)
        return f"attention: {one(self.attention)}; hidden: {one(self.hidden)}"


def build_layer_map(options: LayerMapOptions, student_layers: int, teacher_layers: int) -> LayerMap:
    """Resolve the options for two depths.

    Depths that do not divide take the nearest teacher layer, halves up: 4 of 6 -> 2, 3, 5, 6.

    Raises:
        UserError: the student is deeper than the teacher under a strategy; no pair, one past a last layer, or two
            for one student layer.
    """

    def resolve(key: str, own: list[tuple[int, int]] | None) -> Pairs:
        for name, pairs in ((key, own), ("pairs", options.pairs)):
            if pairs is not None:
                return _checked(name, pairs, student_layers, teacher_layers)
        return _strategy_pairs(options.strategy, student_layers, teacher_layers)

    attention = resolve("attention_pairs", options.attention_pairs)
    hidden = resolve("hidden_pairs", options.hidden_pairs)
    return LayerMap(attention, hidden, student_layers, teacher_layers)


def _strategy_pairs(strategy: str, student_layers: int, teacher_layers: int) -> Pairs:
    if student_layers > teacher_layers:
        raise UserError(
            f"layer_map.strategy={strategy}: the student has {student_layers} layers and the teacher "
            f"{teacher_layers}; a student layer needs a teacher layer of its own. Set student.layers to at most "
            f"{teacher_layers}, or name the pairs in layer_map.pairs."
        )
    layers = range(1, student_layers + 1)
    if strategy == "top":
        return tuple((m, teacher_layers - student_layers + m) for m in layers)
    if strategy == "bottom":
        return tuple((m, m) for m in layers)
    if strategy == "last":
        return ((student_layers, teacher_layers),)
    return tuple((m, nearest_layer(m, student_layers, teacher_layers)) for m in layers)


def nearest_layer(m: int, student_layers: int, teacher_layers: int) -> int:
    """The teacher layer at layer m's share of the depth, m N / M, halves up; at least the first.

    Integer arithmetic, so that the map does not hang on float rounding.
    """
    return max(1, (2 * m * teacher_layers + student_layers) // (2 * student_layers))


def _checked(key: str, pairs: list[tuple[int, int]], student_layers: int, teacher_layers: int) -> Pairs:
    if not pairs:
        raise UserError(f"layer_map.{key}: it names no pair. Name one; a loss is switched off under its own key.")
    for student, teacher in pairs:
        if student > student_layers or teacher > teacher_layers:
            raise UserError(
                f"layer_map.{key}: the pair [{student}, {teacher}] points past the last layer: the student has "
                f"layers 1 to {student_layers}, the teacher 1 to {teacher_layers}. Correct the pair."
            )
    students = [student for student, _ in pairs]
    if len(set(students)) != len(students):
        raise UserError(f"layer_map.{key}: a student layer stands in two pairs ({pairs}). Keep one pair for each.")
    return tuple(sorted(pairs))
