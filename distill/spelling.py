"""How a student of a cut vocabulary reads rows that are in its teacher's pieces: the spelling that its own tokenizer
gives each word, and which of its positions answers to which of the teacher's.
What is compared at those positions is left to losses/, where both models are run to training.py.

The words are put together again from the teacher's pieces, so that nothing of a task need be known: pairs, tokens and
windows of long texts are spelt alike. What comes out is what the student's tokenizer makes of the text that the teacher
reads; a row that was cut at a length, or inside a word, is that much of the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill.vocabulary import CutVocabulary

OWN = "own_"
"""What the names of the student's inputs begin with, in a batch that holds both models'."""
POSITIONS, LAST = "own_positions", "own_last_positions"
KNOWN_WORDS = 100_000
"""Spellings kept: a corpus has millions of words."""

_Word = tuple[list[int], list[int]]


class Spelling:
    """Rows in the student's pieces.

    For each piece of the teacher's answers the student's piece in which its first letter stands. That is the very same
    piece where the student has it and the word lost none before it. The other pieces of a longer spelling are read and
    not compared, but that a span ends where the last of them does.

    Args:
        cut: the student's vocabulary.
        full: the teacher's tokenizer.
        longest: positions that the student has. Words of a row are spelt from its start for as long as what follows
            still fits; behind that they keep the teacher's pieces, and those that the student lacks are unknown to it.
    """

    def __init__(self, cut: CutVocabulary, full: PreTrainedTokenizerBase, longest: int | None = None) -> None:
        self.to_student = cut.to_student.numpy()
        self.unknown = cut.tokenizer.unk_token_id
        self.pad = cut.tokenizer.pad_token_id
        self.own = cut.tokenizer.get_vocab()
        self.pieces = [""] * len(self.to_student)
        for piece, number in full.get_vocab().items():
            self.pieces[number] = piece
        self.lost = self.to_student == self.unknown
        self.lost[full.unk_token_id] = False
        self.inside = np.array([piece.startswith("##") for piece in self.pieces])
        self.special = np.zeros(len(self.pieces), dtype=bool)
        self.special[full.all_special_ids] = True
        self.longest = longest
        self.spell = lru_cache(KNOWN_WORDS)(self._spell)

    def row(self, ids: Sequence[int]) -> _Word:
        """The student's pieces, and for each of the teacher's the place of the one that answers for it."""
        numbers = np.asarray(ids)
        own: list[int] = []
        places: list[int] = []
        for begin, end in self._words_with_lost_pieces(numbers):
            spelt, at = self.spell(tuple(ids[begin:end]))
            self._keep(numbers[len(places) : begin], own, places)
            if self.longest is None or len(own) + len(spelt) + len(ids) - end <= self.longest:
                places += [len(own) + place for place in at]
                own += spelt
        self._keep(numbers[len(places) :], own, places)
        return own, places

    def batch(
        self, rows: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None, width: int
    ) -> dict[str, Tensor]:
        """What `Student` takes beside a padded batch of these rows, (B, width): own_input_ids, own_attention_mask and
        own_token_type_ids, each (B, W); own_positions and own_last_positions (B, width), where the student's pieces for
        each of the teacher's begin and end. Nothing where every piece is the student's.

        Padded positions are answered by a padded one, where the student has a position left.
        """
        if not any(self.lost[np.asarray(row)].any() for row in rows):
            return {}
        spelt = [self.row(row) for row in rows]
        own_width = max(len(own) + (len(row) < width) for row, (own, _) in zip(rows, spelt, strict=True))
        own_width = -(-own_width // 8) * 8
        if self.longest is not None:
            own_width = min(own_width, self.longest)
        shape = len(rows), own_width
        ids, mask, own_types = np.full(shape, self.pad), np.zeros(shape, int), np.zeros(shape, int)
        positions = np.empty((len(rows), width), int)
        last_positions = np.empty((len(rows), width), int)
        for index, (own, places) in enumerate(spelt):
            ids[index, : len(own)] = own
            mask[index, : len(own)] = 1
            padded = min(len(own), own_width - 1)
            positions[index], last_positions[index] = padded, padded
            positions[index, : len(places)] = places
            last_positions[index, : len(places)] = np.maximum(
                places, [*(place - 1 for place in places[1:]), len(own) - 1]
            )
            if types is not None:
                own_types[index, : len(own)] = _spread(types[index], places, len(own))
        found = {"input_ids": ids, "attention_mask": mask, **({} if types is None else {"token_type_ids": own_types})}
        return {
            **{OWN + name: torch.from_numpy(values) for name, values in found.items()},
            POSITIONS: torch.from_numpy(positions),
            LAST: torch.from_numpy(last_positions),
        }

    def _words_with_lost_pieces(self, numbers: np.ndarray) -> list[tuple[int, int]]:
        """Where those begin and end."""
        if not len(lost := np.flatnonzero(self.lost[numbers])):
            return []
        # A row that was cut out of a longer text may begin inside a word.
        begins = ~self.inside[numbers]
        begins[1:] |= self.special[numbers[:-1]]
        begins[0] = True
        edges = np.append(np.flatnonzero(begins), len(numbers))
        words = np.unique(np.searchsorted(edges, lost, side="right"))
        return list(zip(edges[words - 1].tolist(), edges[words].tolist(), strict=True))

    def _keep(self, numbers: np.ndarray, own: list[int], places: list[int]) -> None:
        """Take these pieces over, one for one."""
        places += range(len(own), len(own) + len(numbers))
        own += self.to_student[numbers].tolist()

    def _spell(self, ids: tuple[int, ...]) -> _Word:
        """A word by WordPiece: at every place the longest known piece, the word unknown where there is none."""
        parts = [self.pieces[number].removeprefix("##") for number in ids]
        begun, text = self.pieces[ids[0]].startswith("##"), "".join(parts)
        own: list[int] = []
        starts: list[int] = []
        start = 0
        while start < len(text):
            prefix = "##" if start or begun else ""
            ends = (end for end in range(len(text), start, -1) if prefix + text[start:end] in self.own)
            if (end := next(ends, None)) is None:
                return [self.unknown], [0] * len(ids)
            own.append(self.own[prefix + text[start:end]])
            starts.append(start)
            start = end
        offsets = np.cumsum([0, *map(len, parts[:-1])])
        return own, (np.searchsorted(starts, offsets, side="right") - 1).tolist()


def own_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The student's inputs of a batch that holds both models', under the names that models take; empty where it holds
    none."""
    return {
        name.removeprefix(OWN): values
        for name, values in batch.items()
        if name.startswith(OWN) and name not in (POSITIONS, LAST)
    }


def _spread(types: Sequence[int], places: Sequence[int], length: int) -> np.ndarray:
    """The type of each of the student's pieces: that of the teacher's piece it belongs to."""
    owner = np.searchsorted(places, np.arange(length), side="right") - 1
    return np.asarray(types)[owner]
