"""Claims about `tinybert benchmark`: what is measured, of whom, in which process, and what is refused.
How fast anything is, no test can say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.export.timing import Subject, Workload, measure
from pipelines import benchmark_display
from pipelines.benchmark import SHAPES, Effort, benchmark_models
from tests.builders import run_tinybert
from tests.test_export import copy_run, exported_run
from tests.test_report import Page

QUICK = ("--lengths", "8,16", "--batches", "2", "--threads", "1", "--seconds", "0.01")


@pytest.fixture(scope="module")
def of_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """Folder, figures and words of a benchmark of an exported run."""
    outcome = run_tinybert("benchmark", exported_run(), *QUICK)
    assert outcome.status == 0, outcome.err[-3000:]
    return exported_run(), json.loads((exported_run() / "benchmark.json").read_text(encoding="utf-8")), outcome.out


def test_teacher_and_student_are_measured_in_every_format(of_run: tuple[Path, dict[str, Any], str]) -> None:
    _, figures, out = of_run
    formats = ("pytorch", "onnx", "int8", "openvino")
    assert [one["name"] for one in figures["models"]] == [
        f"{who} {kind}" for who in ("teacher", "student") for kind in formats
    ]
    for one in figures["models"]:
        assert one["name"] in out
        assert [(entry["threads"], entry["length"]) for entry in one["latency"]] == [(1, 8), (1, 16)]
        assert [(entry["batch"], entry["length"]) for entry in one["throughput"]] == [(2, 8), (2, 16)]
        for entry in one["latency"]:
            assert 0 < entry["p50_ms"] <= entry["p95_ms"] <= entry["p99_ms"]
        assert not one["random_weights"]
    assert figures["machine"]["cores"] >= 1


def test_what_is_plotted_is_what_evaluate_and_the_files_say(of_run: tuple[Path, dict[str, Any], str]) -> None:
    folder, figures, _ = of_run
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    found = {one["name"]: one for one in figures["models"]}
    for who in ("teacher", "student"):
        assert found[f"{who} pytorch"]["test"]["accuracy"] == summary[who]["metrics"]["accuracy"]
        assert found[f"{who} onnx"]["test"] == found[f"{who} pytorch"]["test"]
    assert found["student int8"]["bytes"] == (folder / "artefacts" / "int8" / "model.onnx").stat().st_size
    assert found["student pytorch"]["bytes"] == (folder / "student" / "model.safetensors").stat().st_size
    assert (folder / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_shows_the_benchmark_and_the_exported_files(
    of_run: tuple[Path, dict[str, Any], str], tmp_path: Path
) -> None:
    """One thread, the greatest length, as measured; files as the stage export checked them."""
    folder, figures, _ = of_run
    outcome = run_tinybert("report", folder, "--output", tmp_path / "report.html")
    assert outcome.status == 0, outcome.err[-3000:]
    tables = Page((tmp_path / "report.html").read_text(encoding="utf-8")).tables
    expected = []
    for one in figures["models"]:
        (longest,) = [entry for entry in one["latency"] if entry["length"] == 16]
        times = [f"{longest[name]:.2f}" for name in ("p50_ms", "p95_ms")]
        expected.append([one["name"], f"{one['test']['accuracy']:.4f}", f"{one['bytes'] / 1e6:.1f}", *times])
    assert tables["Benchmark"][1:] == expected
    made = json.loads((folder / "export" / "result.json").read_text(encoding="utf-8"))["artefacts"]
    files = {row[0]: row for row in tables["Exported student"][1:]}
    assert files.keys() == made.keys() == {"onnx", "int8", "openvino"}
    for name, one in made.items():
        differing = f"{one['agreement']['differing_predictions']} of 48"
        assert files[name][1:4] == [f"{one['validation']['accuracy']:.4f}", differing, f"{one['bytes'] / 1e6:.1f}"]


def test_peak_memory_is_of_a_process_that_answers_alone(of_run: tuple[Path, dict[str, Any], str]) -> None:
    """The figure neither has what this process holds nor, for ONNX, what torch would."""
    folder, _, _ = of_run
    ballast = np.ones(400_000_000, dtype=np.uint8)
    subjects = [
        Subject("onnx", folder / "artefacts" / "onnx" / "model.onnx", 100),
        Subject("pytorch", folder / "student", 100),
    ]
    onnx, pytorch = (one.peak_bytes for one in measure(subjects, [Workload(1, 8)], 1, 0.01, rounds=1))
    assert onnx < ballast.nbytes
    assert pytorch > onnx + 100e6


def test_all_are_measured_in_each_round(of_run: tuple[Path, dict[str, Any], str]) -> None:
    file = of_run[0] / "artefacts" / "int8" / "model.onnx"
    workloads = [Workload(1, 8), Workload(3, 5)]
    found = measure([Subject("a", file, 100), Subject("b", file, 100)], workloads, 1, 0.0, rounds=4)
    assert [[len(one.seconds[workload]) for workload in workloads] for one in found] == [[4, 4], [4, 4]]


def test_a_model_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(RuntimeError, match=r"broken: .*Traceback"):
        measure([Subject("broken", tmp_path / "model.onnx", 100)], [Workload(1, 8)], 1, 0.0)


def test_shapes_with_random_weights_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    effort = Effort(lengths=(8,), batches=(), threads=(1,), seconds=0.01)
    figures = benchmark_models(["1x16x32x2"], effort, tmp_path)
    assert json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8")) == figures
    assert [one["format"] for one in figures["models"]] == ["pytorch", "onnx", "int8 dynamic", "int8 static_largest"]
    assert all(one["random_weights"] and one["test"] is None for one in figures["models"])
    size = {one["format"]: one["bytes"] for one in figures["models"]}
    assert size["onnx"] < 1.1 * size["pytorch"]  # a graph of so few layers is small beside the 30,522 word vectors
    assert size["int8 dynamic"] < 0.4 * size["pytorch"]
    benchmark_display.show_benchmark(figures)
    assert "Some weights are random" in capsys.readouterr().out


def test_published_shapes_are_named_by_layers_and_width() -> None:
    assert SHAPES["bert-base"] == "12x768x3072x12"
    assert SHAPES["tinybert-4l-312"] == "4x312x1200x12"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "give a run folder, or --models"),
        (("--models", "nowhere/at-all"), "--models: nowhere/at-all is no checkpoint that can be opened and no shape"),
        (("--models", "4x313x1200x12"), "--models: 4x313x1200x12: the width must be a multiple of the heads"),
        (("--models", "bert-base", "--lengths", "513"), "bert-base has positions for 512 pieces, not for 513"),
        (("--models", "bert-base", "--lengths", "16,x"), "--lengths: '16,x' is not a list of positive numbers"),
        (("--models", "bert-base", "--batches", "0"), "--batches: '0' is not a list of positive numbers"),
        (("--models", "bert-base", "--threads", ""), "--lengths and --threads need a number each"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: tuple[str, ...], told: str) -> None:
    outcome = run_tinybert("benchmark", *arguments)
    assert outcome.status == 2, outcome.err
    assert told in outcome.err


def test_a_run_is_refused_lengths_that_it_has_no_positions_for(tmp_path: Path) -> None:
    outcome = run_tinybert("benchmark", copy_run(tmp_path), "--lengths", "5000")
    assert outcome.status == 2, outcome.err
    assert "--lengths: teacher has positions for" in outcome.err
