"""A masked LM's forward for many sequences of any lengths, its logits at masked places alone.
Which sequences these are, and what is read from the logits, is left to masked_lm.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.activations import model_inputs
from distill.augmentation.inference_linear import InferenceLinear
from distill.families import positions

BERT_LAYOUT = ("bert", "roberta", "xlm-roberta", "camembert")
"""Families whose modules have BERT's names."""


@dataclass(frozen=True)
class MaskedSequence:
    """A sequence with the places of its masks; keys say which words they stand for: (passage, word)."""

    ids: list[int]
    types: list[int]
    places: list[int] = field(default_factory=list)
    keys: list[tuple[int, int]] = field(default_factory=list)


class MaskedForward:
    """Hidden states at the masks of a batch, and the logits of many of them together.

    Where the family has BERT's layout, sequences of all lengths lie end to end in one matrix, without padding; only
    attention is computed length by length. The first layer's queries, keys and values are computed once for each
    (piece, position, type), for they depend on nothing else; in the last layer only masked places attend and go on.
    Other families run as they are, one length at a time.

    Vocabularies are large: the head is read once for the masks of many batches.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.head: nn.Module | None = None
        if model.config.model_type in BERT_LAYOUT and not model.config.is_decoder:
            self.head = model.cls if hasattr(model, "cls") else model.lm_head
            body, config = model.base_model, model.config
            # Where positions begin behind the padding piece's number, some embeddings are never used.
            self.first_position = config.max_position_embeddings - (positions(config) or 0)
            self.embeddings, self.heads = body.embeddings, config.num_attention_heads
            self.layers = [_Layer(layer) for layer in body.encoder.layer]
            *attentions, last = [layer.attention.self for layer in body.encoder.layer]
            self.projections = [_projection(each.query, each.key, each.value) for each in attentions]
            self.last_queries, self.last_others = _projection(last.query), _projection(last.key, last.value)

    @torch.inference_mode()
    def hidden(self, sequences: Sequence[MaskedSequence]) -> Tensor:
        """What the head needs of each mask, (masks, width); sequences of one length must come together."""
        groups = [list(same) for _, same in groupby(sequences, key=lambda sequence: len(sequence.ids))]
        if self.head is None:
            return torch.cat([self._whole(group) for group in groups])
        lengths = [len(group[0].ids) for group in groups]
        sizes = [len(group) * length for group, length in zip(groups, lengths, strict=True)]
        pieces, types, numbers, places = self._end_to_end(sequences)
        # Embeddings follow from these three.
        key = (pieces * int(numbers.max() + 1) + numbers) * 2 + types
        _, where = torch.unique(key, return_inverse=True)
        first = torch.empty(int(where.max()) + 1, dtype=torch.long, device=key.device)
        first[where] = torch.arange(len(key), device=key.device)
        distinct = self.embeddings(
            input_ids=pieces[first].unsqueeze(0),
            token_type_ids=types[first].unsqueeze(0),
            position_ids=numbers[first].unsqueeze(0),
        )[0]
        hidden = distinct[where]
        for number, (project, layer) in enumerate(zip(self.projections, self.layers, strict=False)):
            mixed = project(hidden) if number else project(distinct)[where]
            parts = zip(mixed.split(sizes), lengths, strict=True)
            hidden = layer.feed(torch.cat([self._attend(*part) for part in parts]), hidden)
        queries, others = self.last_queries(hidden[places]), self.last_others(hidden)
        owners = [_rows_of_masks(group) for group in groups]
        asked = zip(queries.split([len(rows) for rows in owners]), others.split(sizes), lengths, owners, strict=True)
        return self.layers[-1].feed(torch.cat([self._attend_from(*part) for part in asked]), hidden[places])

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """(masks, vocabulary), in the model's precision."""
        logits: Tensor = hidden if self.head is None else self.head(hidden)
        return logits

    def inputs(self, sequences: Sequence[MaskedSequence]) -> dict[str, Tensor]:
        """Model inputs for sequences of one length."""
        device = self.model.device
        ids = torch.tensor([sequence.ids for sequence in sequences], device=device)
        types = torch.tensor([sequence.types for sequence in sequences], device=device)
        return model_inputs(self.model, {"input_ids": ids, "token_type_ids": types})

    def _whole(self, group: Sequence[MaskedSequence]) -> Tensor:
        places = [place for sequence in group for place in sequence.places]
        return logits_at(self.model, self.inputs(group), _rows_of_masks(group), places)

    def _end_to_end(self, sequences: Sequence[MaskedSequence]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pieces, types and positions of all sequences, and where the masks are, each (n,)."""
        pieces: list[int] = []
        types: list[int] = []
        numbers: list[int] = []
        places: list[int] = []
        for sequence in sequences:
            places += [len(pieces) + place for place in sequence.places]
            numbers += range(self.first_position, self.first_position + len(sequence.ids))
            pieces += sequence.ids
            types += sequence.types
        device = self.model.device
        made = [torch.tensor(values, device=device) for values in (pieces, types, numbers, places)]
        return made[0], made[1], made[2], made[3]

    def _attend(self, mixed: Tensor, length: int) -> Tensor:
        """Attention inside sequences of one length, from queries, keys and values (n, 3 * width) to (n, width)."""
        query, key, value = self._by_head(mixed, length, 3)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(len(mixed), -1)

    def _attend_from(self, queries: Tensor, others: Tensor, length: int, rows: list[int]) -> Tensor:
        """The same from some places alone: queries (m, width) of the sequences `rows`, others (n, 2 * width)."""
        key, value = self._by_head(others, length, 2)
        query = queries.view(len(rows), self.heads, 1, -1)
        return F.scaled_dot_product_attention(query, key[rows], value[rows]).reshape(len(rows), -1)

    def _by_head(self, mixed: Tensor, length: int, parts: int) -> Tensor:
        """(n, parts * width) as (parts, sequences, heads, length, width of a head)."""
        width = mixed.shape[1] // parts // self.heads
        return mixed.view(-1, length, parts, self.heads, width).permute(2, 0, 3, 1, 4)


class _Layer:
    """What follows attention in a layer of BERT's layout, place by place, without dropout."""

    def __init__(self, layer: Any) -> None:
        inner = layer.intermediate
        self.mix = _projection(layer.attention.output.dense)
        self.mixed_norm = layer.attention.output.LayerNorm
        self.widen = InferenceLinear(inner.dense.weight, inner.dense.bias, inner.intermediate_act_fn)
        self.narrow = _projection(layer.output.dense)
        self.norm = layer.output.LayerNorm

    def feed(self, attended: Tensor, hidden: Tensor) -> Tensor:
        between = self.mixed_norm(self.mix(attended) + hidden)
        fed: Tensor = self.norm(self.narrow(self.widen(between)) + between)
        return fed


def _rows_of_masks(group: Sequence[MaskedSequence]) -> list[int]:
    """The number of the sequence of every mask."""
    return [row for row, sequence in enumerate(group) for _ in sequence.places]


def logits_at(model: PreTrainedModel, inputs: Mapping[str, Tensor], rows: Any, places: Any) -> Tensor:
    """Logits (n, vocabulary) of a masked LM at n places of a batch: the head sees no other.

    Args:
        rows: n numbers of sequences; places: n positions in them.
    """

    def select(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[rows, places].unsqueeze(0)
        return output

    handle = model.base_model.register_forward_hook(select)
    try:
        logits: Tensor = model(**inputs).logits[0]
    finally:
        handle.remove()
    return logits


def _projection(*parts: nn.Linear) -> InferenceLinear:
    """Several projections of one input as one product."""
    return InferenceLinear(torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts]))


def packs(sequences: Sequence[MaskedSequence], pieces: int) -> Iterator[list[MaskedSequence]]:
    """Runs of sequences that hold no more than `pieces` together, one sequence at least."""
    pack: list[MaskedSequence] = []
    held = 0
    for sequence in sequences:
        if pack and held + len(sequence.ids) > pieces:
            yield pack
            pack, held = [], 0
        pack.append(sequence)
        held += len(sequence.ids)
    if pack:
        yield pack
