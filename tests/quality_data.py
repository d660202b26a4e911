"""The quality benchmarks' trec made of the toy's rows, with the toy's teacher and students of its shape.
What is claimed is left to test_quality_benchmark.py and test_experiments.py."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import experiments, quality_cells, quality_tasks
from benchmarks.quality_tasks import SIZES, TASKS, Size
from distill import tiny

SMALL = Size(2, 24, 4, 48)


def small_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What --data takes, in `folder`; the benchmarks' own trec is back after the test."""
    trec = folder / "data" / "trec"
    trec.mkdir(parents=True)
    for split in ("train", "test"):
        rows = tiny.load()[split]
        lines = [json.dumps({"sentence": row["text"], "label": row["label"], "label_fine": "x"}) for row in rows]
        with gzip.open(trec / f"{split}.jsonl.gz", "wt") as stream:
            stream.write("\n".join(lines) + "\n")
    monkeypatch.setitem(
        TASKS, "trec", replace(TASKS["trec"], teacher={"max_steps": 4, "learning_rate": 3e-3}, held_out=48)
    )
    monkeypatch.setitem(SIZES, "3L-312", SMALL)
    monkeypatch.setitem(SIZES, "tiny", replace(SMALL, changes={"vocabulary": {"size": 90}}))
    for module in (quality_tasks, quality_cells):
        monkeypatch.setattr(module, "TEACHER", "tiny-random")
    for module in (quality_tasks, quality_cells, experiments):
        monkeypatch.setattr(module, "runtime", lambda: {"cpu_threads": 1, "precision": "fp32"})
    return folder / "data"
