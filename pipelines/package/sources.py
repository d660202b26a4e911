"""What a package needs of this project and of others: source files, and packages at the versions installed here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import requires, version
from importlib.resources import files

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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

SERVING = (
    "interruption.py",
    "serving/__main__.py",
    "serving/artefact.py",
    "serving/batching.py",
    "serving/metrics.py",
    "serving/page.html",
    "serving/page.py",
    "serving/server.py",
)
"""What the server has beside ANSWERING."""


def distill_sources(names: Iterable[str]) -> dict[str, bytes]:
    """Path under a folder that is on Python's path -> content, of files of distill/."""
    root = files("distill")
    return {f"distill/{name}": root.joinpath(*name.split("/")).read_bytes() for name in names}


def pinned(names: Sequence[str]) -> list[str]:
    """`name==version` of these packages alone, as installed here."""
    return [f"{name}=={version(name)}" for name in names]


def pinned_with_dependencies(names: Sequence[str]) -> list[str]:
    """`name==version` of these packages and of all that they need on this platform, as installed here."""
    found: dict[str, str] = {}
    waiting = [Requirement(name) for name in names]
    seen: set[tuple[str, str]] = set()
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        for extra in ("", *wanted.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            found[name] = f"{name}=={version(name)}"
            needs = (Requirement(line) for line in requires(name) or [])
            waiting += [need for need in needs if need.marker is None or need.marker.evaluate({"extra": extra})]
    return [found[name] for name in sorted(found)]
