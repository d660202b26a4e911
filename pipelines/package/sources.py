"""What a package needs of this project and of others: source files, and packages at the versions installed here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from importlib.resources import files

ANSWERING = (
    "__init__.py",
    "settings.py",
    "spans.py",
    "export/__init__.py",
    "export/session.py",
    "serving/__init__.py",
    "serving/answers.py",
    "serving/options.py",
    "serving/protocol.py",
)
"""The files of distill/ that answer a request."""


def distill_sources(names: Iterable[str]) -> dict[str, bytes]:
    """Path under a folder that is on Python's path -> content, of files of distill/."""
    root = files("distill")
    return {f"distill/{name}": root.joinpath(*name.split("/")).read_bytes() for name in names}


def pinned(names: Sequence[str]) -> list[str]:
    """`name==version` of these packages alone, as installed here."""
    return [f"{name}=={version(name)}" for name in names]
