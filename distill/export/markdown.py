"""Markdown whose parts come from data and settings: text that stays text, tables, fenced code.
What is written with it is left to the callers."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

_MEANINGFUL = re.compile(r"[!-,/:-@\[-`{-~]|\.(?=[^\W\d])")
"""ASCII punctuation: what Markdown and HTML can take for markup inside a line. A full stop before a letter could make a
link of a name; a hyphen is one only where a line begins."""
_HARMLESS = frozenset("%'()+,/;=?")


def plain(value: object) -> str:
    """One line of visible characters: runs of white space become a space, what is invisible or steers is left out."""
    spaced = re.sub(r"\s+", " ", str(value))
    return "".join(c for c in spaced if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")).strip()


def text(value: object) -> str:
    """Any value as a part of a line or of a table's cell, which reads as it is and is never markup.

    A backslash before ASCII punctuation makes a letter of it (CommonMark 0.31, section 2.4), and `&` and `<` are
    written as entities for renderers that look for HTML first. Lines begin with words of the caller's, so that a
    leading number or hyphen makes no list.
    """

    def escape(match: re.Match[str]) -> str:
        mark = match.group()
        if mark in _HARMLESS:
            return mark
        return {"&": "&amp;", "<": "&lt;", ">": "&gt;"}.get(mark, f"\\{mark}")

    return _MEANINGFUL.sub(escape, plain(value))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of GitHub's flavour; the first column to the left, the others to the right. Cells are Markdown."""
    align = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, align, *rows))


def code(content: str, language: str) -> str:
    """A fenced block, its fence longer than any run of backticks in the content."""
    longest = max((len(run) for run in re.findall("`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{content.rstrip()}\n{fence}"
