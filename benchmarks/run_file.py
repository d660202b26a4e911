"""What resumable benchmarks share: the JSON that keeps their finished runs, to which several processes may add, and
--only, which names some of the runs there are."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill.settings import UserError

Run = dict[str, Any]


def costs_of(file: Path, precision: str | None = None) -> Path:
    """Beside the runs: what a training step of each kind took where it was first measured; of each precision where
    machines that have another are not to take as many."""
    name = "_".join(part for part in (file.stem, "step_seconds", precision) if part)
    return file.with_name(f"{name}.json")


def read_runs(file: Path) -> list[Run]:
    """The finished runs; none where there is no file."""
    return json.loads(file.read_text(encoding="utf-8"))["runs"] if file.is_file() else []


def chosen(only: Sequence[str], kinds: Sequence[Sequence[str]]) -> list[list[str]]:
    """Of each kind what --only names, or all of it where nothing is.

    Raises:
        UserError: a name is of no kind.
    """
    names = [name for part in only for name in part.split(",") if name]
    for name in names:
        if not any(name in kind for kind in kinds):
            raise UserError(f"--only: {name!r} is none of {', '.join(one for kind in kinds for one in kind)}.")
    return [[one for one in kind if one in names] or list(kind) for kind in kinds]


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Keep other processes from writing, between reading the file and writing it anew."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with (file.parent / f".{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
