"""Claims about benchmarks/task_types.py: its runs are ones that the pipeline takes, each is made once, and the tables
say what is in the JSON."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import task_types
from benchmarks.run_file import read_runs
from benchmarks.task_types import AUGMENTATION, BASE, ROWS, calls
from distill import tiny
from distill.config import load_config
from distill.tasks import TASKS
from tests.builders import ROOT


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Every set's files, with the splits that it has, of the toy's rows."""
    for name in {*ROWS, *AUGMENTATION}:
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        splits = {"squad_slices": ("train", "validation"), "agnews": ("train", "test"), "trec": ("train", "test")}
        for split in splits.get(name, ("train", "validation", "test")):
            rows = tiny.load()["train" if split == "train" else "test"]
            lines = [json.dumps({"sentence": row["text"], "label": row["label"]}) for row in rows]
            with gzip.open(folder / f"{split}.jsonl.gz", "wt") as stream:
                stream.write("\n".join(lines) + "\n")
    return tmp_path / "data"


def test_each_run_is_a_config_of_the_right_task_and_rows(data: Path, tmp_path: Path) -> None:
    found = {call.key: call for call in calls([], data, tmp_path / "work")}
    assert len(found) == len(ROWS) + len(AUGMENTATION) * (1 + 2 * 3)
    for call in found.values():
        config = load_config(ROOT / BASE[0], [*BASE[1:], *(part for part in call.arguments if "=" in part)])
        assert config.task is not None
        task = TASKS[config.task.type]
        assert call.metric in task.deciding_figures(["a", "b", "c"])
        files = config.data.data_files
        assert isinstance(files, dict)
        assert all(Path(str(file)).is_file() for file in files.values())
        assert str(files["train"]) != str(files["test"])
    with_rows, without = (load_config(ROOT / BASE[0], found["trec with", 2].arguments), found["trec without", 2])
    assert with_rows.seed == 2
    assert with_rows.augment is not None
    assert with_rows.augment.copies == 10
    assert "augment=null" in without.arguments
    assert [part for part in without.arguments if "steps" in part] == [
        part for part in found["trec with", 2].arguments if "steps" in part
    ]


def _run(name: str, seed: int, **figures: float) -> dict[str, Any]:
    models = {model: {"accuracy": value, "pearson": value} for model, value in figures.items()}
    metric = "pearson" if name == "stsb" else "accuracy"
    return {"name": name, "seed": seed, "commit": "abc", "metric": metric, "figures": models}


def test_tables_say_what_was_measured() -> None:
    text = task_types.tables(
        [
            _run("stsb", 42, teacher=0.8, student=0.6, undistilled_student=0.2),
            _run("trec teacher", 42),
            *(_run("trec with", seed, teacher=0.97, student=0.90 + 0.01 * seed) for seed in (1, 2, 3)),
            *(_run("trec without", seed, teacher=0.97, student=0.90) for seed in (1, 2, 3)),
            _run("mrpc with", 1, teacher=0.8, student=0.7),
        ]
    )
    assert "| stsb | pearson | 0.8000 | 0.6000 | 75.0% | 0.2000 | abc |" in text
    assert "| trec | 0.9000 ± 0.0000 | 0.9200 ± 0.0100 | 0.9700 | 3 | abc |" in text
    assert "mrpc" not in text  # not all of it was run


def test_what_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--data", str(tmp_path), "--work", str(tmp_path / "work"), "--output", str(tmp_path / "out.json")]
    assert task_types.main([*given, "--only", "sbts"]) == 2
    assert "'sbts' is none of stsb, mrpc" in capsys.readouterr().err
    assert task_types.main([*given, "--only", "stsb"]) == 2
    assert "holds no train.jsonl.gz" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_are_made_once_and_a_failed_one_is_told(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(task_types, "BASE", ("configs/tiny.yaml", *BASE[1:], "data.name=null"))
    monkeypatch.setattr(task_types, "SEEDS", (1, 2))
    short = (*task_types.SENTENCE, "data.max_length=32")
    monkeypatch.setitem(AUGMENTATION, "trec", (short, (4, 4)))
    monkeypatch.setitem(ROWS, "agnews", replace(ROWS["agnews"], settings=short, epochs=(0.5, 0.5, 0.5)))
    output = tmp_path / "out.json"
    given = ["--data", str(data), "--work", str(tmp_path / "work"), "--output", str(output)]
    assert task_types.main([*given, "--only", "augmentation-trec,agnews"]) == 0, capsys.readouterr().err
    runs = read_runs(output)
    assert [(run["name"], run["seed"]) for run in runs] == [
        ("agnews", 42),
        ("trec teacher", 42),
        *((f"trec {way}", seed) for way in ("with", "without") for seed in (1, 2)),
    ]
    shown = capsys.readouterr().out
    assert shown.count("python scripts/distill.py") == 6
    assert "| trec |" in shown
    assert "| agnews | accuracy |" in shown
    assert task_types.main([*given, "--only", "augmentation-trec,agnews"]) == 0
    assert "scripts/distill.py" not in capsys.readouterr().out
    assert task_types.main([*given, "--only", "wnut17"]) == 2  # the toy's rows have no tokens
    assert "wnut17.log says why" in capsys.readouterr().err
