"""Which columns of a row vary, how a row is taken apart into passages, and how it is put together again.
Which replacements are made is left to replacement.py."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill.augmentation.words import Passage, Word, find_words

Edits = Sequence[tuple[Word, str]]
"""Replacements in a passage, in the order of their places."""


@dataclass(frozen=True, kw_only=True)
class TextColumns:
    """The columns whose words vary; every other column is copied.

    texts: strings. tokens, tags: lists of equal length; only tokens tagged `outside` vary. answers: spans
    {text: [...], answer_start: [...]} in the string column `context`; words in a span stay, the starts move.
    """

    texts: tuple[str, ...] = ()
    tokens: str | None = None
    tags: str | None = None
    outside: int | str = "O"
    context: str | None = None
    answers: str | None = None

    @classmethod
    def of(cls, column_names: Collection[str], outside: int | str = "O") -> TextColumns:
        """The varying columns of a data set under this project's column names (distill/tasks/)."""
        if "tokens" in column_names:
            return cls(tokens="tokens", tags="tags", outside=outside)
        if "answers" in column_names:
            return cls(texts=("question",), context="context", answers="answers")
        return cls(texts=tuple(name for name in ("text", "text_pair") if name in column_names))

    def passages(self, row: Mapping[str, Any], left_alone: Collection[str]) -> list[Passage]:
        """The texts of a row: `texts` in order, then the context, or the tokens joined by spaces."""
        passages = [Passage(row[name], tuple(find_words(row[name], left_alone))) for name in self.texts]
        if self.context is not None:
            spans = _answer_spans(row[self.answers or ""])
            words = find_words(row[self.context], left_alone)
            free = (word for word in words if not any(word.start < end and word.end > start for start, end in spans))
            passages.append(Passage(row[self.context], tuple(free)))
        if self.tokens is not None:
            tokens, tags = row[self.tokens], row[self.tags or ""]
            free = (
                span
                for token, tag, span in zip(tokens, tags, _token_spans(tokens), strict=True)
                if tag == self.outside and find_words(token, left_alone) == [Word(0, len(token))]
            )
            passages.append(Passage(" ".join(tokens), tuple(free)))
        return passages

    def rebuild(self, row: Mapping[str, Any], edits: Sequence[Edits]) -> dict[str, Any]:
        """A copy of `row` with the edits made; edits[i] belong to passages(row)[i]."""
        copy = dict(row)
        for name, changes in zip(self.texts, edits, strict=False):
            copy[name] = edited(row[name], changes)
        if self.context is not None:
            copy[self.context] = edited(row[self.context], edits[-1])
            answers = dict(row[self.answers or ""])
            answers["answer_start"] = [_moved(start, edits[-1]) for start in answers["answer_start"]]
            copy[self.answers or ""] = answers
        if self.tokens is not None:
            changed = {word.start: new for word, new in edits[-1]}
            spans = _token_spans(row[self.tokens])
            copy[self.tokens] = [
                changed.get(span.start, token) if token else token
                for token, span in zip(row[self.tokens], spans, strict=True)
            ]
        return copy

    def texts_of(self, row: Mapping[str, Any]) -> list[str]:
        """What a row says, label aside; rows that say the same are duplicates."""
        names = [*self.texts, *([self.context] if self.context else [])]
        return [row[name] for name in names] + ([" ".join(row[self.tokens])] if self.tokens else [])


def edited(text: str, edits: Edits) -> str:
    """`text` with the words replaced and everything between them unchanged."""
    parts, position = [], 0
    for word, new in edits:
        parts += [text[position : word.start], new]
        position = word.end
    return "".join([*parts, text[position:]])


def _moved(position: int, edits: Edits) -> int:
    """Where a position of the original text lies after the edits before it."""
    return position + sum(len(new) - (word.end - word.start) for word, new in edits if word.end <= position)


def _answer_spans(answers: Mapping[str, Sequence[Any]]) -> list[tuple[int, int]]:
    return [(start, start + len(text)) for text, start in zip(answers["text"], answers["answer_start"], strict=True)]


def _token_spans(tokens: Sequence[str]) -> list[Word]:
    """Places of the tokens in " ".join(tokens)."""
    spans, position = [], 0
    for token in tokens:
        spans.append(Word(position, position + len(token)))
        position += len(token) + 1
    return spans
