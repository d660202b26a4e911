"""Augmented rows as parquet shards: each is written whole or not at all, and skipped where it is there.
Making the rows is left to replacement.py."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Features, List, Value
from pyarrow import parquet

from distill.augmentation.replacement import Augmenter

PROVENANCE = {"source_row": Value("int64"), "copy": Value("int32"), "replaced": List(Value("string"))}
GROUP_ROWS = 10_000
"""Rows held in memory before they are written."""


def shard_paths(folder: Path, count: int) -> list[Path]:
    """The files of an augmented set of `count` shards, in the order of its rows."""
    return [folder / f"part-{index:05d}-of-{count:05d}.parquet" for index in range(count)]


def write_shards(
    folder: Path,
    augmenter: Augmenter,
    *,
    count: int,
    fingerprint: str,
    process: tuple[int, int] = (0, 1),
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write this process's share of `count` shards; those already there under the same fingerprint are left.

    Args:
        fingerprint: stands for the rows and all settings; a shard with another one is written anew.
        process: (rank, processes); a process writes shards rank, rank + processes, ...
        progress: called with the number of this process's rows done, those of shards already there included.

    Returns:
        The files of all shards; they are complete when every process has returned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = shard_paths(folder, count)
    for stale in set(folder.glob("part-*.parquet")) - set(paths):
        stale.unlink(missing_ok=True)
    schema = Features({**augmenter.rows.features, **PROVENANCE}).arrow_schema
    done = 0
    for index in range(process[0], count, process[1]):
        if not _is_current(paths[index], fingerprint):
            counts: Counter[str] = Counter()
            report = None if progress is None else _from(done, progress)
            rows = augmenter.part(index, count, progress=report, counts=counts)
            _write(paths[index], rows, schema, fingerprint, counts)
        done += _size(len(augmenter.rows), index, count)
        if progress is not None:
            progress(done)
    return paths


def read_counts(paths: Iterable[Path]) -> Counter[str]:
    """What Augmenter.part counted, summed over shards."""
    counts: Counter[str] = Counter()
    for path in paths:
        counts.update(json.loads(parquet.read_metadata(path).metadata[b"augmentation"])["counts"])
    return counts


def _write(
    path: Path, rows: Iterable[dict[str, Any]], schema: pyarrow.Schema, fingerprint: str, counts: Counter[str]
) -> None:
    temporary = path.with_name(f".{path.name}.part")  # what a killed run left is written over
    try:
        with temporary.open("wb") as stream:
            with parquet.ParquetWriter(stream, schema) as writer:
                group: list[dict[str, Any]] = []
                for row in rows:
                    group.append(row)
                    if len(group) == GROUP_ROWS:
                        writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))
                        group = []
                if group:  # a group of no rows is one that datasets cannot read
                    writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))
                # The counts are known only now; parquet takes them into its footer.
                writer.add_key_value_metadata(
                    {"augmentation": json.dumps({"fingerprint": fingerprint, "counts": counts})}
                )
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_current(path: Path, fingerprint: str) -> bool:
    if not path.is_file():
        return False
    metadata = parquet.read_metadata(path).metadata or {}
    return json.loads(metadata.get(b"augmentation", b"{}")).get("fingerprint") == fingerprint


def _size(rows: int, index: int, count: int) -> int:
    return rows * (index + 1) // count - rows * index // count


def _from(done: int, progress: Callable[[int], None]) -> Callable[[int], None]:
    return lambda more: progress(done + more)
