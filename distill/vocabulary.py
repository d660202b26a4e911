"""Cutting a WordPiece vocabulary to what a domain's text uses: which pieces stay, their new numbers, the tokenizer.
Counting the text is left to pipelines/vocabulary.py, the student's embeddings to students.py and initialization/.

WordPiece takes the longest known piece at every place of a word, from the left. What was the longest among all pieces
is so among fewer: a word whose pieces are all kept is cut as before. A word with a piece that is gone keeps its pieces
before that place and is spelt in shorter ones from there, in single characters at worst; those stay, so that an unknown
piece comes of characters alone that neither the text nor ASCII has.
"""

from __future__ import annotations

import copy
import json
import re
import string
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from distill.settings import UserError, settings

SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
"""Numbers of pieces that a config names."""


@settings
class VocabularyOptions:
    size: PositiveInt | None = None
    """At most so many pieces: the most frequent ones stay. null: no limit."""
    min_count: NonNegativeInt = 1
    """A piece that the text has fewer times is cut. 0: pieces that it does not have fill what is left of `size`, in the
    order of their numbers, in a BERT vocabulary about that of their frequency; but single characters and [unused1]
    and the like."""
    coverage: float = Field(default=1.0, gt=0, le=1)
    """Share of the text's pieces, every occurrence counted, that those kept must make up; rarer ones are cut."""


@dataclass(frozen=True)
class CutVocabulary:
    """What is left of a vocabulary of N pieces.

    kept: (V,), the old number of each new one, rising. to_student: (N,), the new number of each old one, that of the
    unknown piece where it was cut. tokenizer: cuts texts into the V. coverage: share of the counted text's pieces
    that were kept.
    """

    kept: Tensor
    to_student: Tensor
    tokenizer: PreTrainedTokenizerBase
    coverage: float

    def config(self, full: PreTrainedConfig) -> PreTrainedConfig:
        """`full` with this vocabulary's size and numbers."""
        config: Any = copy.deepcopy(full)
        config.vocab_size = len(self.kept)
        for name in SPECIAL_IDS:
            if isinstance(number := getattr(config, name, None), int):
                setattr(config, name, int(self.to_student[number]))
        return config


def check_wordpiece(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError where the tokenizer is not WordPiece, whose pieces alone can be taken out without touching how
    the words of the others are cut."""
    kind = _content(tokenizer)["model"]["type"] if tokenizer.is_fast else "slow"
    if kind != "WordPiece":
        raise UserError(
            f"student.vocabulary: the teacher's tokenizer is {kind}, and only a WordPiece vocabulary can be cut (BERT, "
            "DistilBERT, ELECTRA, MobileBERT): other kinds build pieces out of each other. Set student.vocabulary=null."
        )


def cut_vocabulary(
    tokenizer: PreTrainedTokenizerBase, embeddings: int, counts: np.ndarray, options: VocabularyOptions
) -> CutVocabulary:
    """Keep what `options` ask for of the pieces that occur, and always the special pieces and single characters.

    Args:
        tokenizer: WordPiece.
        embeddings: of the model, at least as many as the tokenizer has pieces.
        counts: (embeddings,), how often the text has each piece.

    Raises:
        UserError: another kind of tokenizer; fewer pieces asked for than must stay.
    """
    check_wordpiece(tokenizer)
    vocabulary = tokenizer.get_vocab()
    special = sorted({*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids})
    counts = counts.copy()
    counts[special] = 0  # the frame of every row is no text
    always = sorted({*special, *_characters(vocabulary, counts)})
    if options.size is not None and options.size < len(always):
        raise UserError(
            f"student.vocabulary.size: {options.size} is too few: the special pieces and the characters of the text "
            f"are {len(always)}. Set at least that."
        )
    kept = np.zeros(embeddings, dtype=bool)
    kept[always] = True
    total, covered = int(counts.sum()), int(counts[kept].sum())
    fillers = _fillers(vocabulary)
    # The most frequent first; of equally frequent ones that with the lower number.
    for piece in np.argsort(-counts, kind="stable"):
        if not counts[piece] and piece not in fillers:
            continue
        full = options.size is not None and kept.sum() >= options.size
        enough = options.coverage < 1 and covered >= options.coverage * total
        if full or counts[piece] < options.min_count or enough:
            break
        covered += 0 if kept[piece] else int(counts[piece])
        kept[piece] = True
    numbers = np.flatnonzero(kept)
    to_student = np.full(embeddings, -1)
    to_student[numbers] = np.arange(len(numbers))
    to_student[to_student < 0] = to_student[tokenizer.unk_token_id]
    return CutVocabulary(
        torch.from_numpy(numbers),
        torch.from_numpy(to_student),
        _rebuilt(tokenizer, {int(old): new for new, old in enumerate(numbers)}),
        covered / total if total else 1.0,
    )


def _fillers(vocabulary: Mapping[str, int]) -> set[int]:
    """Pieces that may stay though the text has none: not BERT's [unused0] and the like, which no text has, nor single
    characters, of which those that may come stay anyway."""
    unused = re.compile(r"\[unused\d+\]")
    return {
        number
        for piece, number in vocabulary.items()
        if len(piece.removeprefix("##")) > 1 and not unused.fullmatch(piece)
    }


def _characters(vocabulary: Mapping[str, int], counts: np.ndarray) -> set[int]:
    """Single characters, at the start of a word and inside, of which the text or ASCII is made."""
    letters = set(string.printable)
    for piece, number in vocabulary.items():
        if counts[number]:
            letters.update(piece.removeprefix("##"))
    return {vocabulary[piece] for letter in letters for piece in (letter, f"##{letter}") if piece in vocabulary}


def _content(tokenizer: Any) -> dict[str, Any]:
    """What tokenizer.json holds."""
    content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return content


def _rebuilt(tokenizer: PreTrainedTokenizerBase, numbers: Mapping[int, int]) -> PreTrainedTokenizerBase:
    """The tokenizer with the pieces that `numbers` (old -> new) names, read from files as any user will read it."""
    with tempfile.TemporaryDirectory(prefix="vocabulary-") as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        model = content["model"]
        model["vocab"] = {piece: numbers[old] for piece, old in model["vocab"].items() if old in numbers}
        for token in content["added_tokens"]:
            token["id"] = numbers[token["id"]]
        if content["padding"] is not None:
            content["padding"]["pad_id"] = numbers[content["padding"]["pad_id"]]
        frame = content["post_processor"] or {}
        for token in frame.get("special_tokens", {}).values():  # a template
            token["ids"] = [numbers[old] for old in token["ids"]]
        for end in ("cls", "sep"):  # BertProcessing: [piece, number]
            if end in frame:
                frame[end][1] = numbers[frame[end][1]]
        (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        settings_file = folder / "tokenizer_config.json"
        options = json.loads(settings_file.read_text(encoding="utf-8"))
        if "added_tokens_decoder" in options:
            decoder = options["added_tokens_decoder"]
            options["added_tokens_decoder"] = {str(numbers[int(old)]): token for old, token in decoder.items()}
            settings_file.write_text(json.dumps(options), encoding="utf-8")
        (folder / "vocab.txt").unlink(missing_ok=True)
        rebuilt = AutoTokenizer.from_pretrained(folder)
    rebuilt.name_or_path = tokenizer.name_or_path
    return rebuilt
