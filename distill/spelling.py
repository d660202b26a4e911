"""How a student of a cut vocabulary reads rows that are in its teacher's pieces: the spelling that its own tokenizer
gives each word, and which of its positions answers to which of the teacher's.
What is compared at those positions is left to losses/, where both models are run to training.py.

The words are put together again from the teacher's pieces, so that nothing of a task need be known: pairs, tokens and
windows of long texts are spelt alike. What comes out is what the student's tokenizer makes of the text itself, unless a
row was cut inside a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill.vocabulary import CutVocabulary

OWN = "own_"
"""What the names of the student's inputs begin with, in a batch that holds both models'."""
POSITIONS = "own_positions"

_Word = tuple[list[int], list[int]]


class Spelling:
    """Rows in the student's pieces.

    A piece of the teacher's that the student has is one of its own at one place. Where it was cut, the piece with which
    the student's spelling of it begins answers for it: what the teacher knows of the whole is asked of the student
    there, and the pieces after it are read but not compared.

    Args:
        cut: the student's vocabulary.
        full: the teacher's tokenizer.
        longest: positions that the student has. A longer row keeps the teacher's pieces, and those that the student
            lacks are unknown to it.
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
        self._known: dict[tuple[int, ...], _Word] = {}

    def row(self, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """The student's pieces, and for each of the teacher's the place of the one that answers for it."""
        numbers = np.asarray(ids)
        if not self.lost[numbers].any():
            return self._unspelt(numbers)
        # A row that was cut out of a longer text may begin inside a word.
        begins = ~self.inside[numbers]
        begins[1:] |= self.special[numbers[:-1]]
        begins[0] = True
        edges = [*np.flatnonzero(begins).tolist(), len(ids)]
        own: list[int] = []
        places: list[int] = []
        for begin, end in pairwise(edges):
            spelt, at = self._word(tuple(ids[begin:end]))
            places += [len(own) + place for place in at]
            own += spelt
        return (own, places) if self.longest is None or len(own) <= self.longest else self._unspelt(numbers)

    def batch(
        self, rows: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None, width: int
    ) -> dict[str, Tensor]:
        """What `Student` takes beside a padded batch of these rows, (B, width): own_input_ids, own_attention_mask and
        own_token_type_ids, each (B, W), and own_positions (B, width). Nothing where every piece is the student's.

        W is such that a row has no less padding than in the batch, as far as the student has positions, and the place
        of each padded position is that of a padded one.
        """
        if not any(self.lost[np.asarray(row)].any() for row in rows):
            return {}
        spelt = [self.row(row) for row in rows]
        own_width = max(len(own) + width - len(row) for row, (own, _) in zip(rows, spelt, strict=True))
        own_width = -(-own_width // 8) * 8
        if self.longest is not None:
            own_width = min(own_width, self.longest)
        shape = len(rows), own_width
        ids, mask, own_types = np.full(shape, self.pad), np.zeros(shape, int), np.zeros(shape, int)
        positions = np.empty((len(rows), width), int)
        for index, (own, places) in enumerate(spelt):
            ids[index, : len(own)] = own
            mask[index, : len(own)] = 1
            positions[index, : len(places)] = places
            positions[index, len(places) :] = np.minimum(len(own) + np.arange(width - len(places)), own_width - 1)
            if types is not None:
                own_types[index, : len(own)] = _spread(types[index], places, len(own))
        found = {"input_ids": ids, "attention_mask": mask, **({} if types is None else {"token_type_ids": own_types})}
        return {
            **{OWN + name: torch.from_numpy(values) for name, values in found.items()},
            POSITIONS: torch.from_numpy(positions),
        }

    def _unspelt(self, numbers: np.ndarray) -> tuple[list[int], list[int]]:
        return self.to_student[numbers].tolist(), list(range(len(numbers)))

    def _word(self, ids: tuple[int, ...]) -> _Word:
        if ids not in self._known:
            self._known[ids] = self._spell(ids)
        return self._known[ids]

    def _spell(self, ids: tuple[int, ...]) -> _Word:
        """WordPiece: at every place the longest known piece, the word unknown where there is none."""
        if not self.lost[list(ids)].any():
            return self._unspelt(np.asarray(ids))
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
        name.removeprefix(OWN): values for name, values in batch.items() if name.startswith(OWN) and name != POSITIONS
    }


def _spread(types: Sequence[int], places: Sequence[int], length: int) -> np.ndarray:
    """The type of each of the student's pieces: that of the teacher's piece it belongs to."""
    owner = np.searchsorted(places, np.arange(length), side="right") - 1
    return np.asarray(types)[owner]
