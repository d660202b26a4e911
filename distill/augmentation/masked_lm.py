"""Candidates from a masked language model: what it would say in the place of a word, batched by length.
Which words are asked for is left to words.py, words of several pieces to vectors.py."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from distill.augmentation.options import AugmentOptions
from distill.augmentation.precision import has_bf16
from distill.augmentation.words import Passage
from distill.settings import UserError

logger = logging.getLogger(__name__)

MaskedLM = tuple[PreTrainedModel, PreTrainedTokenizerBase]

NEAR_TIE = 2.0**-18
"""float32 logits closer than this times the largest may change order with the batch: seven times the change that was
seen from one sequence to 64."""


@dataclass(frozen=True)
class _Forward:
    """A sequence with the places of its masks; keys say which words they stand for: (passage, word)."""

    ids: list[int]
    types: list[int]
    places: list[int] = field(default_factory=list)
    keys: list[tuple[int, int]] = field(default_factory=list)


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

    Batches hold sequences of one length, so no padding enters; the head, and the last layer after its attention, run on
    masked places alone. In float32 a word whose order among the best K + 1 could depend on rounding is decided by a
    plain forward of its sequence alone; bf16 is chosen only where it says the same to the bit in every batch. So
    candidates depend neither on the batch nor on what else is in it.
    Source: TinyBERT (arXiv 1909.10351), algorithm 1; huawei-noah TinyBERT/data_augmentation.py.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: AugmentOptions) -> None:
        if not tokenizer.is_fast or tokenizer.mask_token_id is None:
            raise UserError(
                "augment.masked_lm: its tokenizer must have a mask token and tell where its pieces lie in a text (a "
                "'fast' tokenizer). Name another checkpoint, or set augment.masked_lm and teacher to BERT-like ones."
            )
        self.model, self.tokenizer, self.options = model.eval(), tokenizer, options
        self.texts = _piece_texts(tokenizer)
        exact = options.mode == "exact"
        self.paired = exact if options.second_segment is None else options.second_segment
        self.frame = _Frame.of(tokenizer, self.paired)
        longest = min(options.max_length, tokenizer.model_max_length, model.config.max_position_embeddings)
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
        forwards = sorted(self._forwards(passages), key=lambda forward: len(forward.ids))
        for length, same in groupby(forwards, key=lambda forward: len(forward.ids)):
            for batch in _chunks(list(same), max(1, self.options.batch_tokens // length)):
                keys = [key for forward in batch for key in forward.keys]
                for (passage, word), pieces in zip(keys, self._best(batch), strict=True):
                    texts = (self.texts[piece] for piece in pieces if piece < len(self.texts))
                    found[passage][word] = [text for text in texts if text]
        return found

    def _forwards(self, passages: Sequence[Passage]) -> Iterator[_Forward]:
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
        for index, passage in enumerate(passages):
            pieces, offsets = encoded["input_ids"][index], encoded["offset_mapping"][index]
            windows: dict[int, list[tuple[int, int]]] = {}
            for word, piece in _single_pieces(passage, offsets):
                windows.setdefault(piece // self.window_pieces, []).append((word, piece))
            for window, members in windows.items():
                first = window * self.window_pieces
                text = pieces[first : first + self.window_pieces]
                for group in self._groups(members):
                    ids, types, start = self.frame.fill(text)
                    forward = _Forward(ids, types)
                    for word, piece in group:
                        forward.places.append(start + piece - first)
                        forward.keys.append((index, word))
                        ids[forward.places[-1]] = self.tokenizer.mask_token_id
                    yield forward

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

    @torch.inference_mode()
    def _best(self, batch: list[_Forward]) -> list[list[int]]:
        """The K likeliest pieces at every mask of sequences of one length, in order."""
        rows = [row for row, forward in enumerate(batch) for _ in forward.places]
        places = [place for forward in batch for place in forward.places]
        logits = self._logits_at(batch, rows, places)
        top = logits.topk(min(self.options.candidates + 1, logits.shape[-1]), dim=-1)
        best: list[list[int]] = top.indices[:, : self.options.candidates].tolist()
        if self.model.dtype == torch.float32:
            gaps = (top.values[:, :-1] - top.values[:, 1:]).amin(-1)
            unsure = gaps < NEAR_TIE * logits.abs().amax(-1)
            for index in unsure.nonzero().flatten().tolist():
                alone = self.model(**self._inputs([batch[rows[index]]])).logits[0, places[index]]
                order = alone.sort(descending=True, stable=True).indices
                best[index] = order[: self.options.candidates].tolist()
        return best

    def _logits_at(self, batch: list[_Forward], rows: list[int], places: list[int]) -> Tensor:
        """Logits (n, vocabulary) float32 at the masked places: all other hidden states are dropped on the way."""

        def select(hidden: Tensor) -> Tensor:
            return hidden[rows, places].unsqueeze(0)

        def select_inputs(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(map(select, args))

        def select_output(module: nn.Module, args: Any, output: Any) -> Any:
            output.last_hidden_state = select(output.last_hidden_state)
            return output

        # What follows attention in the last layer works position by position.
        layers = getattr(getattr(self.model.base_model, "encoder", None), "layer", None)
        # MobileBERT's layer adds its whole input once more at its end.
        last = None if layers is None or hasattr(layers[-1], "bottleneck") else layers[-1]
        after_attention = getattr(getattr(last, "attention", None), "output", None)
        if after_attention is not None:
            handle = after_attention.register_forward_pre_hook(select_inputs)
        else:
            handle = self.model.base_model.register_forward_hook(select_output)
        try:
            logits = self.model(**self._inputs(batch)).logits
        finally:
            handle.remove()
        return logits[0].float()

    @torch.inference_mode()
    def _reduce_precision(self) -> None:
        """To bf16; on the automatic choice only if a sequence alone gets the logits that it gets in a batch."""
        whole, self.model = self.model, copy.deepcopy(self.model).to(torch.bfloat16)
        if self.options.precision == "bf16":
            return
        generator = torch.Generator().manual_seed(0)
        for length in (5, 12, 33):
            ids = torch.randint(self.model.config.vocab_size, (64, length), generator=generator)
            batch = [_Forward(sequence, [0] * length) for sequence in ids.tolist()]
            together = self._logits_at(batch, list(range(64)), [1] * 64)
            for part in (1, 7):
                if not torch.equal(self._logits_at(batch[:part], list(range(part)), [1] * part), together[:part]):
                    logger.warning("bf16 logits depend on the batch on this processor: candidates are found in float32")
                    self.model = whole
                    return

    def _inputs(self, batch: list[_Forward]) -> dict[str, Tensor]:
        inputs = {"input_ids": torch.tensor([forward.ids for forward in batch], device=self.model.device)}
        if "token_type_ids" in self.tokenizer.model_input_names:
            types = [forward.types for forward in batch]
            inputs["token_type_ids"] = torch.tensor(types, device=self.model.device)
        return inputs


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


def _piece_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The word each piece begins, by id; "" for a piece that continues a word."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    texts = [""] * (max(vocabulary.values()) + 1)
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


def _chunks(items: list[_Forward], size: int) -> Iterator[list[_Forward]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
