"""What a report is made of: sections of blocks, in plain values. How they look is left to the template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True)
class Figure:
    """A drawing: inline SVG, and in words what it shows."""

    kind: ClassVar[str] = "figure"
    title: str
    svg: str
    caption: str = ""


@dataclass(frozen=True)
class Group:
    """Figures side by side where the page is wide enough, below each other where not; folded away under `summary`."""

    kind: ClassVar[str] = "group"
    figures: Sequence[Figure]
    summary: str = ""
    """Words of what can be unfolded; empty for a group that is always shown."""
    open: bool = False
    title: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under heads. The first column names the row; the others are figures unless `texts` says otherwise."""

    kind: ClassVar[str] = "table"
    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    summary: str = ""
    """Words of what can be unfolded; empty for a table that is always shown."""
    texts: bool = False
    """Whether the cells are words, set to the left."""


@dataclass(frozen=True)
class Tables:
    """Tables side by side where the page is wide enough, below each other where not."""

    kind: ClassVar[str] = "tables"
    tables: Sequence[Table]


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Quote:
    """A text from the data, and why it stands here."""

    kind: ClassVar[str] = "quote"
    text: str
    note: str


@dataclass(frozen=True)
class Code:
    """A file, folded away."""

    kind: ClassVar[str] = "code"
    summary: str
    text: str


@dataclass(frozen=True)
class Missing:
    """What the run does not have, and what would give it."""

    kind: ClassVar[str] = "missing"
    text: str


@dataclass(frozen=True)
class Answer:
    """What one model says of a row."""

    who: str
    """teacher or student; the label of people is the template's."""
    answer: str
    detail: str = ""
    """Its probability, or its error."""
    right: bool | None = None
    """None where an answer is neither right nor wrong."""


@dataclass(frozen=True)
class Row:
    """A test row on which teacher and student disagree."""

    number: int
    gold: str
    answers: Sequence[Answer]
    texts: Sequence[tuple[str, str]]
    """(what it is, the text)."""


@dataclass(frozen=True)
class Rows:
    """Test rows, each with its text and both answers."""

    kind: ClassVar[str] = "rows"
    rows: Sequence[Row]
    summary: str = ""
    """Words of what can be unfolded; empty for rows that are always shown."""


Block = Group | Table | Tables | Text | Quote | Code | Missing | Rows


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading."""

    name: str
    """The anchor."""
    title: str
    blocks: Sequence[Block]
    lead: str = ""


@dataclass(frozen=True)
class Tile:
    """One figure in large type."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class Head:
    """What can be read in ten seconds."""

    headline: str
    sentences: Sequence[str]
    tiles: Sequence[Tile] = field(default_factory=tuple)
    blocks: Sequence[Block] = field(default_factory=tuple)
