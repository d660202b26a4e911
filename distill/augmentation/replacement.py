"""Drawing replacements and making augmented rows, block by block.
Where candidates come from is left to masked_lm.py and vectors.py, files to shards.py."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from distill.augmentation.columns import Edits, TextColumns, edited
from distill.augmentation.masked_lm import MaskedCandidates, MaskedLM, load_masked_lm
from distill.augmentation.options import AugmentOptions
from distill.augmentation.vectors import Neighbours, read_vectors
from distill.augmentation.words import STOP_WORDS, Passage, Word, share_without_spaces, usable, with_casing
from distill.settings import UserError

logger = logging.getLogger(__name__)

BLOCK_ROWS = 512
"""Rows whose candidates are found together; enough for full batches of every length."""
LANGUAGE_ROWS = 1000
"""Rows read to see whether the language has spaces between words."""

Row = dict[str, Any]
Keep = Callable[[list[Row]], list[bool]]
Choices = list[list[str]]
"""What each word of a passage may become."""


def augment(
    rows: Dataset,
    options: AugmentOptions,
    *,
    columns: TextColumns,
    seed: int,
    masked_lm: MaskedLM | None = None,
    protected: Collection[str] = (),
    shard: tuple[int, int] = (0, 1),
    progress: Callable[[int], None] | None = None,
    excluded: Collection[bytes] = frozenset(),
    keep: Keep | None = None,
    cache: Path | None = None,
    counts: Counter[str] | None = None,
) -> Iterator[Row]:
    """The augmented rows of one shard (index, count) of `rows`; see Augmenter."""
    augmenter = Augmenter(
        rows,
        options,
        columns=columns,
        seed=seed,
        masked_lm=masked_lm,
        protected=protected,
        excluded=excluded,
        keep=keep,
        cache=cache,
    )
    return augmenter.part(*shard, progress=progress, counts=counts)


class Augmenter:
    """Up to N augmented copies of each row, the rows themselves not among them.

    In each copy every word that has candidates is replaced with probability p by one of them, drawn evenly. The draws
    are a function of seed, row and copy number, so the rows are the same however they are shared out. Columns are those
    of `rows` and source_row (its number in `rows`), copy (from 0) and replaced ("old->new", in the order of the text).

    Args:
        columns: which columns vary.
        masked_lm: proposes candidates for single-piece words; read from options.masked_lm where not given.
        protected: words (lower case) left alone besides stop words, label names for instance.
        excluded: `row_keys` of validation and test rows; a copy that says the same is dropped.
        keep: says of a list of augmented rows which to keep; a teacher filter.
        cache: folder for neighbours already found.

    Raises:
        UserError: vectors that cannot be read, nothing to take candidates from, a language without spaces.
    """

    def __init__(
        self,
        rows: Dataset,
        options: AugmentOptions,
        *,
        columns: TextColumns,
        seed: int,
        masked_lm: MaskedLM | None = None,
        protected: Collection[str] = (),
        excluded: Collection[bytes] = frozenset(),
        keep: Keep | None = None,
        cache: Path | None = None,
    ) -> None:
        _refuse_without_spaces(rows, columns)
        self.rows, self.options, self.columns, self.seed = rows, options, columns, seed
        self.excluded, self.keep = excluded, keep
        stop_words = options.stop_words if options.stop_words is not None else STOP_WORDS
        self.left_alone = frozenset(stop_words) | frozenset(protected)
        self.candidates = Candidates(options, masked_lm, cache)

    def part(
        self,
        index: int,
        count: int,
        *,
        progress: Callable[[int], None] | None = None,
        counts: Counter[str] | None = None,
    ) -> Iterator[Row]:
        """The augmented rows of part `index` of `count` parts.

        Args:
            progress: called with the number of rows done.
            counts: gains rows, rows_without_candidates, words, words_without_candidates, copies, and what became of
                them: kept, unchanged, duplicates, excluded, filtered.
        """
        counts = Counter() if counts is None else counts
        first, last = (len(self.rows) * edge // count for edge in (index, index + 1))
        for start in range(first, last, BLOCK_ROWS):
            numbers = range(start, min(start + BLOCK_ROWS, last))
            made = list(self._block(numbers, counts))
            kept = self.keep(made) if self.keep is not None and made else [True] * len(made)
            counts["filtered"] += len(made) - sum(kept)
            counts["kept"] += sum(kept)
            yield from (row for row, is_kept in zip(made, kept, strict=True) if is_kept)
            if progress is not None:
                progress(numbers.stop - first)

    def _block(self, numbers: range, counts: Counter[str]) -> Iterator[Row]:
        rows = [self.rows[number] for number in numbers]
        passages = [self.columns.passages(row, self.left_alone) for row in rows]
        # Questions share contexts, pairs share premises: each passage is asked for once.
        found = self.candidates.find(dict.fromkeys(passage for several in passages for passage in several))
        for number, row, several in zip(numbers, rows, passages, strict=True):
            choices = [found[passage] for passage in several]
            words = [candidates for passage in choices for candidates in passage]
            counts["rows"] += 1
            counts["words"] += len(words)
            counts["words_without_candidates"] += words.count([])
            if any(words):
                yield from self._copies(row, number, several, choices, counts)
            else:
                counts["rows_without_candidates"] += 1

    def _copies(
        self, row: Row, number: int, passages: list[Passage], choices: list[Choices], counts: Counter[str]
    ) -> Iterator[Row]:
        """The copies of one row; those that say what the row or an earlier copy says are dropped."""
        own = _key(row, self.columns)
        seen = {own}
        for copy in range(self.options.copies):
            random = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, number, copy])))
            probability = self.options.probability
            edits = [
                _draw(passage, words, probability, random) for passage, words in zip(passages, choices, strict=True)
            ]
            augmented = self.columns.rebuild(row, edits)
            key = _key(augmented, self.columns)
            counts["copies"] += 1
            if key in seen or key in self.excluded:
                counts["unchanged" if key == own else "duplicates" if key in seen else "excluded"] += 1
                continue
            seen.add(key)
            replaced = [
                f"{passage.text[word.start : word.end]}->{new}"
                for passage, changes in zip(passages, edits, strict=True)
                for word, new in changes
            ]
            yield {**augmented, "source_row": number, "copy": copy, "replaced": replaced}


def row_keys(rows: Iterable[Mapping[str, Any]], columns: TextColumns) -> set[bytes]:
    """What rows say, hashed: case and white space do not count, labels neither."""
    return {_key(row, columns) for row in rows}


class Candidates:
    """Candidates for the words of passages: the masked LM's for single pieces, the vectors' for all others."""

    def __init__(self, options: AugmentOptions, masked_lm: MaskedLM | None, cache: Path | None) -> None:
        if masked_lm is None and options.masked_lm is not None:
            masked_lm = load_masked_lm(options.masked_lm)
        if masked_lm is None and options.vectors is None:
            raise UserError(
                "augment.vectors: null leaves nothing to take candidates from, as the teacher has no masked-LM head. "
                "Name word vectors there, or a checkpoint with such a head in augment.masked_lm."
            )
        self.masked = MaskedCandidates(*masked_lm, options) if masked_lm is not None else None
        self.neighbours: Neighbours | None = None
        if options.vectors is not None:
            vectors = read_vectors(options.vectors, options.vocabulary_limit)
            self.neighbours = Neighbours(vectors, options.candidates, cache)
        if self.masked is None:
            logger.info("candidates come from word vectors alone: there is no masked LM")

    def lists(self, passages: Sequence[Passage]) -> list[list[list[str]]]:
        """The candidates of every word of every passage, in order of preference, as the published script has them."""
        if self.masked is not None:
            found = self.masked.find(passages)
        else:
            found = [[None] * len(passage.words) for passage in passages]
        others = {
            passage.text[word.start : word.end]
            for passage, candidates in zip(passages, found, strict=True)
            for word, proposed in zip(passage.words, candidates, strict=True)
            if proposed is None
        }
        near = self._near(sorted(others))
        return [
            [
                near[passage.text[word.start : word.end]] if proposed is None else proposed
                for word, proposed in zip(passage.words, candidates, strict=True)
            ]
            for passage, candidates in zip(passages, found, strict=True)
        ]

    def _near(self, words: Sequence[str]) -> dict[str, list[str]]:
        """The nearest words of each; looked up as the tokenizer reads the word (uncased ones drop accents, and so does
        the published script), then as it is written, then in lower case."""
        if self.neighbours is None:
            return {word: [] for word in words}
        vocabulary = self.neighbours.positions
        read = self.masked.normalize if self.masked is not None else str
        forms = {
            word: next((form for form in (read(word), word, word.lower()) if form in vocabulary), word)
            for word in words
        }
        near = self.neighbours.find(forms.values())
        return {word: near[form] for word, form in forms.items()}

    def find(self, passages: Collection[Passage]) -> dict[Passage, Choices]:
        """What each word of each passage may become, in its own casing."""
        ordered = list(passages)
        found: dict[Passage, Choices] = {}
        for passage, lists in zip(ordered, self.lists(ordered), strict=True):
            words = [passage.text[word.start : word.end] for word in passage.words]
            found[passage] = [
                [with_casing(candidate, word) for candidate in usable(word, candidates)]
                for word, candidates in zip(words, lists, strict=True)
            ]
        return found


def _draw(passage: Passage, words: Choices, probability: float, random: np.random.Generator) -> Edits:
    """Two draws a word, whatever comes of them: whether, and which."""
    whether, which = random.random((2, len(words)))
    return [
        (word, candidates[int(share * len(candidates))])
        for word, candidates, chance, share in zip(passage.words, words, whether, which, strict=True)
        if candidates and chance < probability
    ]


def _key(row: Mapping[str, Any], columns: TextColumns) -> bytes:
    said = "\0".join(" ".join(text.casefold().split()) for text in columns.texts_of(row))
    return hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _refuse_without_spaces(rows: Dataset, columns: TextColumns) -> None:
    """Words are found by the spaces between them: a language that has none is refused."""
    step = max(1, len(rows) // LANGUAGE_ROWS)
    share = share_without_spaces(text for index in range(0, len(rows), step) for text in columns.texts_of(rows[index]))
    if share > 0.3:
        raise UserError(
            f"augment: {share:.0%} of the letters in the training rows belong to scripts written without spaces "
            "(Chinese, Japanese, Thai, Lao, Khmer, Burmese), where words cannot be told apart. Set augment to null."
        )


def mark_replaced(
    source: Mapping[str, Any], augmented: Mapping[str, Any], columns: TextColumns, mark: Callable[[str], str]
) -> list[tuple[str, str]]:
    """(source text, augmented text) of every varying column, the replaced words passed through `mark` in both.

    `replaced` says what became what but not where: the first places at which it explains the augmented text are taken.
    """
    remaining = [tuple(change.split("->", 1)) for change in augmented["replaced"]]
    marked = []
    for old_text, new_text in zip(columns.texts_of(source), columns.texts_of(augmented), strict=True):
        edits = _explain(old_text, new_text, remaining)
        remaining = remaining[len(edits) :]
        positions = [(word, mark(old_text[word.start : word.end])) for word, _ in edits]
        marked.append((edited(old_text, positions), edited(old_text, [(word, mark(new)) for word, new in edits])))
    return marked


def _explain(old: str, new: str, changes: Sequence[tuple[str, ...]]) -> Edits:
    """The first of `changes`, with places in `old`, that turn it into `new`."""

    def search(position: int, shift: int, used: int) -> list[tuple[Word, str]] | None:
        if old[position:] == new[position + shift :]:
            return []
        if used == len(changes):
            return None
        before, after = changes[used]
        start = old.find(before, position)
        while start >= 0 and old[position:start] == new[position + shift : start + shift]:
            if new.startswith(after, start + shift):
                end = start + len(before)
                rest = search(end, shift + len(after) - len(before), used + 1)
                if rest is not None:
                    return [(Word(start, end), after), *rest]
            start = old.find(before, start + 1)
        return None

    return search(0, 0, 0) or []
