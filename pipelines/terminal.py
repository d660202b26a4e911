"""Text from data, files and configs as a terminal may show it."""

from __future__ import annotations

import unicodedata


def printable(text: str) -> str:
    """What would move the cursor, clear the screen or change the title is spelt out, an escape as backslash x1b."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else repr(c)[1:-1] for c in text)
