"""The JSON that a resumable benchmark keeps its finished runs in; several processes may add to it."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Run = dict[str, Any]


def read_runs(file: Path) -> list[Run]:
    """The finished runs; none where there is no file."""
    return json.loads(file.read_text(encoding="utf-8"))["runs"] if file.is_file() else []


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Keep other processes from writing, between reading the file and writing it anew."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with (file.parent / f".{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
