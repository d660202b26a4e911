"""That the benchmark of augmentation runs, and that its plain implementation and ours agree on a few rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.augment import main
from distill import tiny
from tests.builders import write_rows


def test_it_measures_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["people talk often near our town", "rain and snow", "a long morning walk", "guitar song , played softly"]
    data = write_rows(tmp_path / "rows.jsonl", [{"sentence": text} for text in texts * 2])
    given = ["--data", data, "--rows", "8", "--json", str(tmp_path / "figures.json")]
    assert main([*given, "--masked-lm", str(tiny.teacher_folder())]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert json.loads(capsys.readouterr().out) == figures
    assert figures["exact_identical"]
    assert figures["neighbours_identical"]
    assert figures["neighbours_vectors"] == 100_000
    assert figures["rows"] == 8
    assert 0 <= figures["fast_overlap"] <= 1
    for name in ("exact", "fast", "neighbours"):
        plain = "plain_neighbours" if name == "neighbours" else "plain"
        assert figures[f"{name}_speedup"] == figures[f"{plain}_seconds"] / figures[f"{name}_seconds"]


def test_data_that_is_not_there_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path / "no.jsonl"), "--json", str(tmp_path / "figures.json")]) == 2
    assert "--data" in capsys.readouterr().err
