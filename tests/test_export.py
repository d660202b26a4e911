"""Claims about exporting a run's student: what lies in RUN/artefacts, what is refused, and that nothing is left then.
The graph itself is test_export_graph.py's."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from onnx import numpy_helper
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from distill.checkpoint import write_folder
from distill.config import dump_config, load_config
from distill.export.parity import Agreement, agreement, require_agreement
from distill.export.quantization import LARGE_TABLE_ROWS, RECIPES, Candidate, choose, quantize, ranges
from distill.settings import UserError
from pipelines import artefacts
from tests.builders import Outcome, finished_run, run_tinybert

FILES = {"onnx": {"model.onnx"}, "int8": {"model.onnx"}, "openvino": {"model.xml", "model.bin"}}


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A copy of a finished run, without trackers."""
    return copy_run(tmp_path)


def copy_run(parent: Path) -> Path:
    folder = shutil.copytree(finished_run(), parent / "run")
    config = folder / "config.yaml"
    config.write_text(dump_config(load_config(config, ["tracking=[]"])), encoding="utf-8")
    return folder


@cache
def exported_run() -> Path:
    """A run whose student was exported to everything; look at it, or work on a copy."""
    folder = copy_run(Path(mkdtemp(prefix="tinybert-tests-")))
    # Of an untrained toy every way into 8 bits may cost points; what is kept then is test_choice's.
    outcome = run_tinybert("export", folder, "--to", ",".join(FILES), "export.max_int8_loss_points=100")
    assert outcome.status == 0, outcome.err[-3000:]
    return folder


def metadata(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    return found


def test_each_format_is_a_folder_with_all_it_takes_to_use_it() -> None:
    folder = exported_run() / "artefacts"
    assert {path.name for path in folder.iterdir()} == set(FILES)
    for name, files in FILES.items():
        names = {path.name for path in (folder / name).iterdir()}
        assert {*files, "config.json", "tokenizer.json", "tokenizer_config.json", "metadata.json"} == names
    student = exported_run() / "student" / "model.safetensors"
    assert (folder / "int8" / "model.onnx").stat().st_size < (folder / "onnx" / "model.onnx").stat().st_size
    assert student.is_file()


@pytest.mark.parametrize("name", FILES)
def test_an_artefact_answers_with_what_lies_in_its_folder_alone(name: str) -> None:
    """Tokenizer, session and label names as a server would use them; the oracle is the student's safetensors."""
    folder = exported_run() / "artefacts" / name
    texts = ["rain and wind every morning", "people often talk about the piano", "snow"]
    rows = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="np")
    if name == "openvino":
        compiled = openvino.Core().compile_model(str(folder / "model.xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        logits = compiled({one.any_name: rows[one.any_name] for one in compiled.inputs})["logits"]
    else:
        session = onnxruntime.InferenceSession(folder / "model.onnx")
        (logits,) = session.run(["logits"], {one.name: rows[one.name] for one in session.get_inputs()})
    model = AutoModelForSequenceClassification.from_pretrained(exported_run() / "student").eval()
    with torch.inference_mode():
        expected = model(**{key: torch.from_numpy(value) for key, value in rows.items()}).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=0.3 if name == "int8" else 1e-4)
    assert AutoConfig.from_pretrained(folder).id2label == {0: "weather", 1: "music"}


@pytest.mark.parametrize("name", FILES)
def test_metadata_names_what_was_made_and_hashes_every_file(name: str) -> None:
    folder = exported_run() / "artefacts" / name
    found = metadata(folder)
    assert found["labels"] == ["weather", "music"]
    assert (found["format"], found["task"], found["max_length"]) == (name, "single_label_classification", 32)
    assert found["metric"] == "accuracy"
    assert 0 <= found["validation"]["accuracy"] <= 1
    others = {path.name for path in folder.iterdir()} - {"metadata.json"}
    assert found["files"].keys() == others
    for file in others:
        content = (folder / file).read_bytes()
        assert found["files"][file] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert found["versions"]["onnxruntime"] == onnxruntime.__version__
    assert ("openvino" in found["versions"]) is (name == "openvino")


def test_the_figures_of_every_candidate_are_kept() -> None:
    result = json.loads((exported_run() / "export" / "result.json").read_text())["artefacts"]
    assert {one["name"] for one in result["int8"]["candidates"]} == set(RECIPES)
    for one in result["int8"]["candidates"]:
        assert one.keys() == {"name", "metric", "latency_ms", "bytes"}
    assert result["int8"]["recipe"] in RECIPES
    for name in ("onnx", "openvino"):
        assert result[name]["agreement"]["differing_predictions"] == 0
        assert result[name]["agreement"]["largest_difference"] < 1e-4


def test_a_run_without_artefacts_is_as_before(run_folder: Path) -> None:
    outcome = run_tinybert("export", run_folder)
    assert outcome.status == 0, outcome.err
    assert not (run_folder / "artefacts").exists()


# What is refused


def breaking(change: float) -> Any:
    """Stands in for export_graph: writes the exported graph with every weight of its layers moved by `change`."""
    whole = exported_run() / "artefacts" / "onnx" / "model.onnx"  # made before anything stands in

    def write(model: Any, batch: Any, file: Path) -> None:
        program = onnx.load(whole)
        for tensor in program.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2:
                tensor.CopyFrom(
                    numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(change), tensor.name)
                )
        onnx.save(program, file)

    return write


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if "artefacts" in path.name or path.name.endswith(".part")]


def test_an_artefact_that_is_not_the_student_is_refused_and_none_is_left(run_folder: Path) -> None:
    (run_folder / "artefacts" / "onnx").mkdir(parents=True)  # of a student before
    with mock.patch.object(artefacts, "export_graph", breaking(0.01)):
        outcome = run_tinybert("export", run_folder, "--to", "onnx,int8")
    assert outcome.status == 1
    assert "onnx: over" in outcome.err
    assert "at most 0.0001" in outcome.err
    assert left_over(run_folder) == []
    assert not (run_folder / "export" / "result.json").exists()
    assert (run_folder / "student" / "model.safetensors").is_file(), "the student itself was right"


def test_int8_that_loses_too_much_is_refused_by_how_much(run_folder: Path) -> None:
    def worse(name: str, metric: float, *rest: Any) -> Candidate:
        return Candidate(name, metric - 0.02, *rest)

    with mock.patch.object(artefacts, "Candidate", worse):
        outcome = run_tinybert("export", run_folder, "--to", "int8")
    assert outcome.status == 2, outcome.err
    for part in (
        "export.max_int8_loss_points",
        "0.5 points",
        "validation accuracy",
        *(f"{name} 0." for name in RECIPES),
        "2.00 lost",
        "leave int8 out",
    ):
        assert part in outcome.err
    assert left_over(run_folder) == []


def refused(*arguments: str | Path) -> Outcome:
    outcome = run_tinybert("export", *arguments)
    assert outcome.status == 2, outcome.err
    assert "Traceback" not in outcome.err
    return outcome


def test_an_unknown_format_names_the_known_ones(run_folder: Path) -> None:
    outcome = refused(run_folder, "--to", "onnx,tflite")
    assert "--to: 'tflite' is no format; the formats are onnx, int8" in outcome.err


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    assert "no run folder (no config.yaml in it)" in refused(tmp_path, "--to", "onnx").err


def test_a_run_without_a_student_is_refused(run_folder: Path) -> None:
    for stage in ("task", "general"):
        (run_folder / stage / "result.json").unlink()
    assert "has no student yet. Finish it first: tinybert run" in refused(run_folder, "--to", "onnx").err


@pytest.mark.parametrize(
    ("missing", "kind", "extra"), [("onnxscript", "onnx", "export"), ("openvino", "openvino", "openvino")]
)
def test_a_missing_package_is_named_with_the_extra(missing: str, kind: str, extra: str, run_folder: Path) -> None:
    find = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == missing else find(name, *rest)

    with mock.patch("importlib.util.find_spec", without):
        outcome = refused(run_folder, "--to", kind)
    assert missing in outcome.err
    assert f"pip install 'tinybert-distill[{extra}]'" in outcome.err


def test_general_distillation_alone_has_nothing_to_check_an_artefact_by(run_folder: Path) -> None:
    outcome = refused(run_folder, "--to", "onnx", "task=null", "augment=null")
    assert "export.to" in outcome.err
    assert "set task" in outcome.err


# The choice among candidates: latency, metric and bytes on made-up tables


def table(**rows: tuple[float, float, int]) -> list[Candidate]:
    return [Candidate(name, metric, latency, size) for name, (metric, latency, size) in rows.items()]


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        ({"a": (0.90, 9.0, 10), "b": (0.90, 7.0, 10)}, "b"),  # the fastest
        ({"a": (0.90, 9.0, 10), "b": (0.89, 7.0, 10)}, "a"),  # of those that lose half a point at most
        ({"a": (0.895, 9.0, 10), "b": (0.89499, 7.0, 10)}, "a"),  # the limit itself is allowed
        ({"a": (0.91, 9.0, 10), "b": (0.92, 8.0, 10)}, "b"),  # better than float32 is no loss
        ({"a": (0.897, 7.0, 10), "b": (0.900, 7.2, 10)}, "b"),  # as fast: the better one
        ({"a": (0.897, 7.0, 10), "b": (0.900, 7.3, 10)}, "a"),  # not as fast
        ({"a": (0.90, 7.0, 12), "b": (0.90, 7.1, 10)}, "b"),  # as fast and as good: the smaller one
    ],
)
def test_choice(rows: dict[str, tuple[float, float, int]], best: str) -> None:
    for candidates in (table(**rows), table(**rows)[::-1]):
        assert choose(candidates, "accuracy", 0.90, 0.5).name == best


def test_a_choice_among_none_tells_each_loss() -> None:
    with pytest.raises(UserError, match=r"b 0\.8800 \(2\.00 lost\), a 0\.5000 \(40\.00 lost\)"):
        choose(table(b=(0.88, 1, 1), a=(0.5, 1, 1)), "accuracy", 0.90, 0.5)
    with pytest.raises(UserError):
        choose(table(a=(float("nan"), 1, 1)), "accuracy", 0.90, 0.5)


def _products_saturate() -> bool:
    """Whether the processor adds two products of eight bits in sixteen, which is too few: x86 without VNNI."""
    flags = Path("/proc/cpuinfo")
    text = flags.read_text() if flags.is_file() else ""
    return "avx2" in text and "vnni" not in text


_saturating = pytest.mark.skipif(
    _products_saturate(), reason="int8 products of any weights saturate on this processor (no VNNI): deployment.md"
)


@pytest.mark.parametrize("weights", [pytest.param("any", marks=_saturating), "pairs that fit in 16 bits"])
@pytest.mark.parametrize("name", RECIPES)
def test_eight_bits_are_within_the_rounding_of_eight_bits(name: str, weights: str, tmp_path: Path) -> None:
    """y = x W: with one scale a column an error of at most half a step in each factor, summed over 32 products."""
    random = np.random.default_rng(0)
    weight = (random.normal(size=(32, 16)) * np.geomspace(0.01, 10, 16)).astype(np.float32)
    if weights != "any":  # no two neighbours are above 128 steps together: 255 * 128 < 2^15
        half = np.abs(weight).max(0) / 2
        weight = np.clip(weight, -half, half)
        weight[:2] = np.stack([2 * half, 0 * half])
    x = random.uniform(-1, 1, size=(40, 32)).astype(np.float32)
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 18]> g (float[N, 32] x) => (float[N, 16] y) '
        "{h = MatMul(x, W) y = Identity(h)}"
    )
    model.graph.initializer.append(numpy_helper.from_array(weight, "W"))
    onnx.save(model, tmp_path / "float.onnx")
    seen = ranges(tmp_path / "float.onnx", [{"x": x[:20]}, {"x": x[20:]}])
    quantize(tmp_path / "float.onnx", name, seen, tmp_path / "int8.onnx")
    (y,) = onnxruntime.InferenceSession(tmp_path / "int8.onnx").run(None, {"x": x})
    largest = np.abs(weight).max(0)
    bound = 32 * (1 / 255 * largest + largest / 127)
    assert np.all(np.abs(y - x @ weight) <= bound)
    assert (tmp_path / "int8.onnx").read_bytes().find(weight.tobytes()) == -1, "the weights are stored in 8 bits"


def test_each_word_has_a_scale_of_its_own(tmp_path: Path) -> None:
    """Half a step of the row's own largest value, however large another row is."""
    table = np.random.default_rng(0).normal(size=(LARGE_TABLE_ROWS, 8)).astype(np.float32)
    table *= np.geomspace(1e-3, 1e3, len(table), dtype=np.float32)[:, None]
    table[7] = 0
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 18]> g (int64[N, T] ids) => (float[N, T, 8] y) '
        "{h = Gather(E, ids) y = Identity(h)}"
    )
    model.graph.initializer.append(numpy_helper.from_array(table, "E"))
    onnx.save(model, tmp_path / "float.onnx")
    quantize(tmp_path / "float.onnx", "dynamic", {}, tmp_path / "int8.onnx")
    ids = np.arange(LARGE_TABLE_ROWS).reshape(4, -1)
    (y,) = onnxruntime.InferenceSession(tmp_path / "int8.onnx").run(None, {"ids": ids})
    error = np.abs(y.reshape(table.shape) - table).max(1)
    assert np.all(error <= np.abs(table).max(1) / 254 * 1.001)
    assert (tmp_path / "int8.onnx").stat().st_size < table.nbytes / 2


# Agreement


def test_agreement_by_hand() -> None:
    found = agreement(
        [np.array([1.0, 2.0]), np.array([0.5, 0.25])], [np.array([1.0, 2.5]), np.array([0.5, 0.25])], [1, 0], [0, 0]
    )
    assert found == Agreement(rows=2, largest_difference=0.5, differing_predictions=1)


def test_a_value_is_no_prediction_that_could_differ() -> None:
    assert agreement([np.array([1.0])], [np.array([1.00001])], [1.0], [1.00001]).differing_predictions == 0


@pytest.mark.parametrize(
    "found", [Agreement(9, 2e-4, 0), Agreement(9, 0.0, 1), Agreement(9, float("nan"), 0)], ids=["far", "other", "nan"]
)
def test_what_does_not_agree_is_refused(found: Agreement) -> None:
    with pytest.raises(RuntimeError, match="onnx: over 9 validation rows"):
        require_agreement("onnx", found)


def test_a_folder_that_cannot_be_filled_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()

    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_folder(tmp_path / "folder", fail)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "old"]
