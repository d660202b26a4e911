"""Candidates from a masked language model: what it would say in the place of a word, batched by length.
Which words are asked for is left to words.py, words of several pieces to vectors.py."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from distill.augmentation.masked_forward import MaskedForward, MaskedSequence, packs
from distill.augmentation.options import AugmentOptions
from distill.augmentation.precision import has_bf16
from distill.augmentation.words import Passage
from distill.families import positions
from distill.settings import UserError

logger = logging.getLogger(__name__)

MaskedLM = tuple[PreTrainedModel, PreTrainedTokenizerBase]

HEAD_MASKS = 512
"""Masks whose logits are computed together, about."""
NEAR_TIE = 2.0**-17
"""float32 logits closer than this times the largest may change order with the batch: three and a half times the change
of a gap that was seen."""


def find_masked_lm(checkpoint: str) -> MaskedLM | None:
    """The masked LM and tokenizer of a checkpoint, float32; None where it carries no (whole) masked-LM head."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report on missing weights is our return value
    try:
        model, found = AutoModelForMaskedLM.from_pretrained(checkpoint, output_loading_info=True, dtype=torch.float32)
    except ValueError:  # no such head for this family
        return None
    finally:
        transformers_logging.set_verbosity(verbosity)
    if found["missing_keys"]:
        return None
    return model.eval(), AutoTokenizer.from_pretrained(checkpoint)


def load_masked_lm(checkpoint: str) -> MaskedLM:
    """As find_masked_lm.

    Raises:
        UserError: nothing there, or no masked-LM head in it.
    """
    try:
        found = find_masked_lm(checkpoint)
    except OSError as error:
        raise UserError(
            f"augment.masked_lm: {checkpoint} cannot be opened: {str(error).splitlines()[0]}. Give a folder with "
            "config.json, or a hub name and the network."
        ) from error
    if found is None:
        raise UserError(
            f"augment.masked_lm: {checkpoint} has no masked-LM head. Name a checkpoint that has one (bert-base-uncased "
            "has), or take candidates from augment.vectors alone."
        )
    return found


class MaskedCandidates:
    """Top-K words in the place of each single-piece word, as the published script finds them.

    exact: per word one sequence [CLS] text with the word masked [SEP] text [SEP]; the K pieces of largest logit at the
    mask, largest first, those that continue a word left out. fast: words at least `separation_pieces` apart share a
    sequence. A text that does not fit is cut into windows; the published script cuts its second segment, then drops
    the words beyond.

    No padding enters, and the head runs on masked places alone; see masked_forward.py. In float32 a word whose order
    among the best K + 1 could depend on rounding is decided by a plain forward of its sequence alone; bf16 is chosen
    only where it says the same to the bit in every batch. So candidates depend neither on the batch nor on what else is
    in it.
    Source: TinyBERT (arXiv 1909.10351), algorithm 1; huawei-noah TinyBERT/data_augmentation.py.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: AugmentOptions) -> None:
        if not tokenizer.is_fast or tokenizer.mask_token_id is None:
            raise UserError(
                "augment.masked_lm: its tokenizer must have a mask token and tell where its pieces lie in a text (a "
                "'fast' tokenizer). Name another checkpoint, or set augment.masked_lm and teacher to BERT-like ones."
            )
        self.model, self.tokenizer, self.options = model.eval(), tokenizer, options
        self.forward = MaskedForward(self.model)
        self.batch_tokens = options.batch_tokens or (2048 if model.device.type == "cpu" else 4096)
        self.texts = _piece_texts(tokenizer, model.config.vocab_size)
        exact = options.mode == "exact"
        self.paired = exact if options.second_segment is None else options.second_segment
        self.frame = _Frame.of(tokenizer, self.paired)
        longest = min(options.max_length, tokenizer.model_max_length, positions(model.config) or options.max_length)
        self.window_pieces = (longest - self.frame.special_pieces) // (2 if self.paired else 1)
        if self.window_pieces < 1:
            raise UserError(f"augment.max_length: {longest} leaves no room for text. Set it to 64 or more.")
        wants_bf16 = options.mode == "fast" and has_bf16(model.device)
        if options.precision == "bf16" or (options.precision == "auto" and wants_bf16):
            self._reduce_precision()

    def normalize(self, word: str) -> str:
        """The word as the tokenizer reads it: in lower case and without accents, for instance."""
        normalizer = self.tokenizer.backend_tokenizer.normalizer
        return normalizer.normalize_str(word) if normalizer is not None else word

    def find(self, passages: Sequence[Passage]) -> list[list[list[str] | None]]:
        """Candidates of every word of every passage; None for words of several pieces."""
        found: list[list[list[str] | None]] = [[None] * len(passage.words) for passage in passages]
        sequences = sorted(self._sequences(passages), key=lambda sequence: len(sequence.ids))
        waiting: list[MaskedSequence] = []
        states: list[Tensor] = []
        for pack in packs(sequences, self.batch_tokens):
            states.append(self.forward.hidden(pack))
            waiting += pack
            if sum(map(len, states)) >= HEAD_MASKS or waiting[-1] is sequences[-1]:
                for (passage, word), pieces in self._best(waiting, torch.cat(states)):
                    found[passage][word] = [self.texts[piece] for piece in pieces if self.texts[piece]]
                waiting, states = [], []
        return found

    def _sequences(self, passages: Sequence[Passage]) -> Iterator[MaskedSequence]:
        if not passages:
            return
        encoded = self.tokenizer(
            [passage.text for passage in passages],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        texts = zip(passages, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        for index, (passage, pieces, offsets) in enumerate(texts):
            windows: dict[int, list[tuple[int, int]]] = {}
            for word, piece in _single_pieces(passage, offsets):
                windows.setdefault(piece // self.window_pieces, []).append((word, piece))
            for window, members in windows.items():
                first = window * self.window_pieces
                text = pieces[first : first + self.window_pieces]
                for group in self._groups(members):
                    ids, types, start = self.frame.fill(text)
                    sequence = MaskedSequence(ids, types)
                    for word, piece in group:
                        sequence.places.append(start + piece - first)
                        sequence.keys.append((index, word))
                        ids[sequence.places[-1]] = self.tokenizer.mask_token_id
                    yield sequence

    def _groups(self, members: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """Which words share a forward: each joins the first group whose last word is far enough before it."""
        if self.options.mode == "exact":
            return [[member] for member in members]
        groups: list[list[tuple[int, int]]] = []
        for member in members:
            for group in groups:
                if member[1] - group[-1][1] >= self.options.separation_pieces:
                    group.append(member)
                    break
            else:
                groups.append([member])
        return groups

    def _best(self, sequences: Sequence[MaskedSequence], states: Tensor) -> Iterator[tuple[tuple[int, int], list[int]]]:
        """The key of every mask and its K likeliest pieces, in order."""
        masks = [(sequence, place, key) for sequence in sequences for place, key in _masks(sequence)]
        for start in range(0, len(masks), HEAD_MASKS):
            logits = self.forward.logits(states[start : start + HEAD_MASKS])
            top = logits.topk(min(self.options.candidates + 1, logits.shape[-1]), dim=-1)
            best: list[list[int]] = top.indices[:, : self.options.candidates].tolist()
            if self.model.dtype == torch.float32:
                gaps = (top.values[:, :-1] - top.values[:, 1:]).amin(-1)
                largest = torch.maximum(top.values[:, 0], -logits.amin(-1))
                unsure = gaps < NEAR_TIE * largest
                for index in unsure.nonzero().flatten().tolist():
                    best[index] = self._best_alone(*masks[start + index][:2])
            yield from zip((key for _, _, key in masks[start : start + HEAD_MASKS]), best, strict=True)

    @torch.inference_mode()
    def _best_alone(self, sequence: MaskedSequence, place: int) -> list[int]:
        """By a plain forward of the sequence alone, sorted."""
        logits = self.model(**self.forward.inputs([sequence])).logits[0, place]
        order: list[int] = logits.sort(descending=True, stable=True).indices[: self.options.candidates].tolist()
        return order

    def _reduce_precision(self) -> None:
        """To bf16; on the automatic choice only if a sequence alone gets the logits that it gets in a batch."""
        whole, self.model = self.model, copy.deepcopy(self.model).to(torch.bfloat16)
        self.forward = MaskedForward(self.model)
        if self.options.precision == "bf16":
            return
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.config.vocab_size
        batch = [
            MaskedSequence(ids, [0] * length, [1])
            for length in (5, 12, 33)
            for ids in torch.randint(vocabulary, (64, length), generator=generator).tolist()
        ]
        together = self.forward.logits(self.forward.hidden(batch))
        for first, last in ((0, 1), (30, 37), (60, 130), (191, 192)):
            part = self.forward.logits(self.forward.hidden(batch[first:last]))
            if not torch.equal(part, together[first:last]):
                logger.warning("bf16 logits depend on the batch on this processor: candidates are found in float32")
                self.model, self.forward = whole, MaskedForward(whole)
                return


@dataclass(frozen=True)
class _Frame:
    """The special pieces around one text, or around a text and itself, with the token types of all."""

    before: list[int]
    between: list[int]
    after: list[int]
    paired: bool
    second_type: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, paired: bool) -> _Frame:
        encoded = tokenizer("a", "a" if paired else None, return_token_type_ids=True)
        ids, parts = encoded["input_ids"], encoded.sequence_ids(0)
        first, last = parts.index(0), len(parts) - parts[::-1].index(1 if paired else 0)
        between = [piece for piece, part in zip(ids[first:last], parts[first:last], strict=True) if part is None]
        return cls(ids[:first], between, ids[last:], paired, encoded["token_type_ids"][last - 1])

    @property
    def special_pieces(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)

    def fill(self, text: list[int]) -> tuple[list[int], list[int], int]:
        """Piece ids, token types, and where the (first) text begins."""
        ids = [*self.before, *text]
        if not self.paired:
            ids += self.after
            return ids, [0] * len(ids), len(self.before)
        # BERT counts the separator between the texts to the first; families with one type have no second.
        types = [0] * (len(ids) + len(self.between))
        ids += [*self.between, *text, *self.after]
        return ids, types + [self.second_type] * (len(ids) - len(types)), len(self.before)


def _masks(sequence: MaskedSequence) -> Iterator[tuple[int, tuple[int, int]]]:
    return zip(sequence.places, sequence.keys, strict=True)


def _single_pieces(passage: Passage, offsets: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(word, piece) for the words that are one piece. Words and pieces both come in the text's order."""
    piece = 0
    for index, word in enumerate(passage.words):
        while piece < len(offsets) and offsets[piece][1] <= word.start:
            piece += 1
        inside = piece
        while inside < len(offsets) and offsets[inside][0] < word.end:
            inside += 1
        if inside - piece == 1 and offsets[piece][0] >= word.start and offsets[piece][1] <= word.end:
            yield index, piece


def _piece_texts(tokenizer: PreTrainedTokenizerBase, count: int) -> list[str]:
    """The word each piece begins, by id; "" for a piece that continues a word and for the model's spare ones."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    texts = [""] * max(count, *(index + 1 for index in vocabulary.values()))
    wordpiece = any(piece.startswith("##") for piece in vocabulary)
    # Byte-level BPE and SentencePiece mark the space before a word instead of the continuation.
    marked = not wordpiece and any(piece.startswith(("\u0120", "\u2581")) for piece in vocabulary)
    for piece, index in vocabulary.items():
        if wordpiece:
            texts[index] = "" if piece.startswith("##") else piece
        elif marked:
            starts = piece.startswith(("\u0120", "\u2581"))
            texts[index] = tokenizer.convert_tokens_to_string([piece]).strip() if starts else ""
        else:
            texts[index] = piece
    return texts
