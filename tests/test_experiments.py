"""Claims about the search for the recipe: each way changes what it says and nothing else, no test row is read, what is
measured is kept and not measured again, and a change is the mean over pairs."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import experiments, quality_cells
from benchmarks.experiment_questions import BASE, QUESTIONS, START, TASK_NAMES
from benchmarks.quality_cells import Cell
from benchmarks.quality_systems import SYSTEMS, System
from benchmarks.quality_tasks import TASKS
from distill import monitoring
from distill.config import Config, to_plain
from pipelines.encoded import Encoded
from tests.quality_data import small_data

WAYS = [(name, way) for name, question in QUESTIONS.items() for way in question.ways]


def config(system: System, size: str = "3L-312", task: str = "trec") -> Config:
    cell = Cell(TASKS[task], "way", system, size, 0, 60.0)
    return quality_cells._config(cell, Path("work"), Path("run"), dict.fromkeys(system.shares, 80), Path("answers"))


def differences(one: Any, other: Any, place: str = "") -> set[str]:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return {key for name in one | other for key in differences(one.get(name), other.get(name), f"{place}.{name}")}
    return set() if one == other else {place[1:]}


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> System:
    monkeypatch.setattr(quality_cells, "runtime", lambda: {"cpu_threads": 1, "precision": "fp32"})
    return START


CHANGED = {
    "random": {"student.initialization"},
    "share-0": {"task.intermediate"},
    "intermediate-1e-3": {"task.intermediate.learning_rate"},
    "logits-4e-4": {"task.logits.learning_rate"},
    "joint": {"task.joint", "task.intermediate", "task.logits.learning_rate"},
    "joint-balance": {
        "task.joint",
        "task.intermediate",
        "task.logits.learning_rate",
        "task.logits.balance",
        "task.logits.measure_gradients_every_steps",
    },
    "kept-layers": {"task.joint"},
    "cosine": {"task.intermediate.schedule", "task.logits.schedule"},
    "batch-16": {"task.intermediate.batch_size", "task.logits.batch_size"},
    "temperature-4": {"task.losses.logits.temperature"},
    "last": {"layer_map.strategy"},
    "no-hidden": {"task.losses.hidden", "task.losses.embedding"},
    "relations": {"task.losses.attention", "task.losses.relations"},
    "labels-0.5": {"task.losses.labels"},
    "balance": {"task.intermediate.balance", "task.intermediate.measure_gradients_every_steps"},
    "dropout-0.1": {"student.dropout"},
    "found-random": {"student.initialization"},
    "found-no-attention": {"task.losses.attention"},
    "found-batch-8": {"task.logits.batch_size"},
    "copies-2": {"augment", "runtime.logits_cache", "runtime.states_cache_gb"},
}


@pytest.mark.parametrize(("question", "way"), WAYS)
def test_a_way_changes_what_it_says_and_nothing_else(question: str, way: str, base: System) -> None:
    compared = QUESTIONS[question].base
    if compared != BASE:
        base = QUESTIONS["joint"].ways[compared](base)
    tried = QUESTIONS[question].ways[way](START)
    assert tried != base
    changed = differences(to_plain(config(tried)), to_plain(config(base)))
    if question.endswith("general"):
        assert (tried.general_steps > 0, changed) == (True, set())
    elif way in CHANGED:
        assert changed == CHANGED[way]
    elif way not in ("share-0.3", "share-0.8"):  # those alone have other lengths, which the test fixes
        assert changed


def test_names_of_ways_are_one_way_each() -> None:
    names = [way for _, way in WAYS]
    assert len(names) == len({*names, BASE}) - 1
    assert set(CHANGED) <= set(names)
    assert set(TASK_NAMES) <= set(TASKS)


def test_ways_are_measured_once_on_validation_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = small_data(tmp_path, monkeypatch), tmp_path / "experiments.json"
    given = ["--data", str(data), "--work", str(tmp_path / "work"), "--output", str(output), "--seconds", "0.2"]
    assert experiments.main([*given, "--only", "labels,trec,0"]) == 0, capsys.readouterr().err

    read: list[str] = []
    figures = Encoded.figures

    def recorded(self: Encoded, model: Any, split: str) -> dict[str, float]:
        read.append(split)
        return figures(self, model, split)

    monkeypatch.setattr(Encoded, "figures", recorded)
    assert experiments.main([*given, "--only", "temperature,trec,0"]) == 0, capsys.readouterr().err
    found = json.loads(output.read_text())["runs"]
    assert [run["way"] for run in found] == ["two-phases", "labels-0.5", "temperature-2", "temperature-4"]
    assert set(read) == {"validation"}
    monkeypatch.setattr(experiments, "run", lambda *arguments: pytest.fail("measured again"))
    assert experiments.main([*given, "--only", "temperature,labels,trec,0"]) == 0


def test_what_a_step_costs_is_measured_once_and_gives_the_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = small_data(tmp_path, monkeypatch), tmp_path / "experiments.json"
    given = ["--data", str(data), "--work", str(tmp_path / "work"), "--output", str(output), "--seconds", "0.2"]
    asked: list[str] = []

    def costs(cell: Cell, *_: Path) -> dict[str, float]:
        asked.append(cell.system)
        return {
            "first weights": 0.06,
            "teacher once": 0.03,
            "augmentation": 0.01,
            "intermediate": 0.005,
            "logits": 0.005,
        }

    monkeypatch.setattr(quality_cells, "_costs", costs)
    known = {
        "trec/two-phases/3L-312": {
            **dict.fromkeys(("first weights", "teacher once", "augmentation"), 0.0),
            "intermediate": 0.004,
            "logits": 0.01,
        }
    }
    costs_file = tmp_path / "experiments_step_seconds_fp32.json"
    costs_file.write_text(json.dumps(known))
    assert experiments.main([*given, "--only", "rates,batch,trec,0"]) == 0, capsys.readouterr().err
    # A rate makes no step dearer; another batch does.
    assert asked == ["batch-16"]
    steps = {run["way"]: run["steps"] for run in json.loads(output.read_text())["runs"]}
    assert steps["two-phases"] == steps["logits-4e-4"] == {"intermediate": 30, "logits": 8}
    # By hand: 0.1 of 0.2 seconds are left, 0.06 and 0.04 of them at 0.005 a step; no phase has fewer than 8.
    assert steps["batch-16"] == {"intermediate": 12, "logits": 8}
    kept = json.loads(costs_file.read_text())
    assert kept.items() > known.items()


@pytest.mark.parametrize(("processor", "share"), [(0.25, 0.25), (2.0, 1.0)], ids=["a quarter of a core", "two cores"])
def test_costs_are_what_the_meter_says_and_what_was_had_of_a_core(
    processor: float, share: float, base: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A meter that is told to be slow: eight tokens a second, whatever the machine does. The processor's time runs at a
    quarter of the clock's: others had the rest of the core."""
    data = small_data(tmp_path, monkeypatch)
    quality_cells.make_teacher(TASKS["trec"], data, tmp_path / "work")
    read = monitoring.Meter.read

    def slow(self: monitoring.Meter, rate: float, tokens: int) -> dict[str, float]:
        return {**read(self, rate, tokens), "tokens_per_second": 8.0}

    monkeypatch.setattr(monitoring.Meter, "read", slow)
    monkeypatch.setattr(quality_cells.time, "process_time", lambda: processor * time.monotonic())
    cell = Cell(TASKS["trec"], BASE, base, "3L-312", 0, 60.0)
    costs = quality_cells._costs(cell, tmp_path / "work", tmp_path / "scratch")
    result = json.loads((tmp_path / "scratch" / "probe" / "task" / "result.json").read_text())
    for phase in ("intermediate", "logits"):
        assert costs[phase] == pytest.approx(result["phases"][phase]["tokens"] / 32 / 8)
    assert costs["first weights"] == pytest.approx(share * result["first_weights_seconds"], rel=1e-3)
    # The teacher had read all rows before the first step: fewer steps than an epoch has would not have asked for it.
    once = sum(phase["teacher_seconds"] for phase in result["phases"].values())
    assert costs["teacher once"] == pytest.approx(share * once, rel=1e-3)
    assert once > 0
    assert list((tmp_path / "scratch" / "answers").glob("states-*/*.safetensors"))


def test_general_distillation_is_done_once_for_all_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = small_data(tmp_path, monkeypatch)
    monkeypatch.setattr(quality_cells, "BATCH_SIZE", 4)
    (data / "books").mkdir()
    with gzip.open(data / "books" / "train.00.txt.gz", "wt") as stream:
        stream.write("the rain is often cold\n\n" * 200)
    student = quality_cells.general_student(2, "3L-312", data, tmp_path / "work")
    weights = student / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert (student / "projections.safetensors").is_file()
    assert quality_cells.general_student(2, "3L-312", data, tmp_path / "work") == student
    assert weights.stat().st_mtime_ns == written


def run(way: str, task: str, seed: int, value: float) -> dict[str, Any]:
    return {"way": way, "task": task, "seed": seed, "budget_seconds": 60.0, "value": value, "metric": "accuracy"} | {
        "cpu": "Some CPU",
        "precision": "fp32",
    }


def test_a_change_is_the_mean_over_pairs_with_its_standard_error() -> None:
    """By hand: changes of 10, -10 and 6 percent; mean 2, deviation sqrt((64 + 144 + 16) / 2), over sqrt(3) 6.11."""
    runs = [
        *(run("two-phases", task, seed, value) for task, seed, value in (("a", 0, 0.5), ("a", 1, 0.8), ("b", 0, 0.5))),
        *(run("warm", task, seed, value) for task, seed, value in (("a", 0, 0.55), ("a", 1, 0.72), ("b", 0, 0.53))),
        run("warm", "b", 1, 0.9),
    ]
    assert experiments.change([one for one in runs if one["way"] == "warm"], runs) == "+2.00 ± 6.11"
    assert experiments.change([one for one in runs if one["way"] == "two-phases"], runs) == ""
    assert experiments.change([runs[3]], runs) == "+10.00 (1 pair)"
    assert experiments.change([runs[0]], runs, "warm") == "-9.09 (1 pair)"


def test_the_report_has_each_way_that_was_run_and_names_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments, "PAGE", tmp_path / "experiments.md")
    output = tmp_path / "experiments.json"
    runs = [run("two-phases", "trec", 0, 0.8), run("two-phases", "trec", 1, 0.9), run("last", "trec", 0, 0.88)]
    runs.append({**run("last", "trec", 0, 0.93), "precision": "bf16"})
    runs.append({**run("last", "trec", 0, 0.7), "size": "tiny"})
    output.write_text(json.dumps({"runs": runs}))
    assert experiments.main(["--report", "--output", str(output)]) == 0
    text = (tmp_path / "experiments.md").read_text()
    # What another precision gave is no pair of these.
    assert text.index("3L-312, 60 seconds in bf16:") < text.index("| `last` | 0.9300 (1) |  | open |")
    assert text.index("| `last` | 0.9300 (1) |") < text.index("3L-312, 60 seconds in fp32:")
    assert "|  | `two-phases` | 0.8500 (2) |  |  |" in text
    assert "| `last` | 0.8800 (1) | +10.00 (1 pair) | open |" in text
    assert "Not run: random, " in text
    assert "stsb (pearson)" not in text
    assert text.count("Measured on: Some CPU.") == 3
    # Nor is another size.
    assert text.index("3L-312, 60 seconds in fp32:") < text.index("tiny, 60 seconds in fp32:")
    assert text.index("tiny, 60 seconds in fp32:") < text.index("| `last` | 0.7000 (1) |  | open |")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--data"),
        (["--data", "."], "holds no train.jsonl.gz"),
        (["--data", ".", "--only", "trek"], "'trek' is none of initialization, "),
        (["--report"], "holds no runs"),
    ],
)
def test_wrong_arguments_end_with_2(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--output", str(tmp_path / "none.json"), "--work", str(tmp_path / "work")]
    assert experiments.main([*arguments, *given]) == 2
    assert told in capsys.readouterr().err


def test_a_size_may_want_another_rate_and_nothing_else() -> None:
    recipe = SYSTEMS["default"]
    assert isinstance(recipe, System)
    plain = replace(recipe, rates={})
    for size, expected in (("3L-312", set()), ("tiny", {"task.logits.learning_rate"})):
        assert differences(to_plain(config(recipe, size)), to_plain(config(plain, size))) == expected


@pytest.mark.parametrize(
    ("task", "changed"),
    [
        ("sst2", set()),
        ("agnews", {"runtime.logits_cache", "runtime.states_cache_gb"}),
        ("stsb", {"augment"}),
        ("wnut17", {"task.unlabelled"}),
    ],
)
def test_more_text_is_the_default_with_more_text(task: str, changed: set[str]) -> None:
    """Asked once about stsb's copies too: both keep the teacher's answers there."""
    short, long = SYSTEMS["default"], SYSTEMS["more-text"]
    assert isinstance(short, System)
    assert isinstance(long, System)
    assert differences(to_plain(config(long, task=task)), to_plain(config(short, task=task))) == changed
