"""The benchmark of a run, or of any models: what is measured, and the figures of it in benchmark.json.
How forwards are timed is left to distill/export/timing.py, what people see to benchmark_display.py."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, PreTrainedConfig, PreTrainedModel

from distill.activations import model_inputs
from distill.checkpoint import write_json
from distill.export.graph import export_graph
from distill.export.options import FORMATS, OPENVINO, require_packages
from distill.export.quantization import quantize, ranges
from distill.export.runtime import ArtefactModel
from distill.export.session import MODEL_FILE, model_file
from distill.export.timing import Subject, Timed, Workload, all_threads, measure
from distill.families import positions
from distill.settings import UserError
from distill.teachers import resolve
from pipelines.artefacts import Workshop
from pipelines.card.facts import measured_files
from pipelines.encoded import Encoded
from pipelines.export import artefacts_folder
from pipelines.machine import machine
from pipelines.run import Run

FILE = "benchmark.json"
PACKAGES = ("torch", "transformers", "onnxruntime")

SHAPES = {
    "bert-large": "24x1024x4096x16",
    "bert-base": "12x768x3072x12",
    "tinybert-6l-768": "6x768x3072x12",
    "tinybert-4l-312": "4x312x1200x12",
}
"""Published shapes by name: layers x width x inner width x heads, with BERT's vocabulary."""


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    lengths: Sequence[int] = (16, 64, 128)
    batches: Sequence[int] = (8, 32)
    threads: Sequence[int] = field(default_factory=lambda: tuple(dict.fromkeys((1, all_threads()))))
    seconds: float = 5.0
    """For each model, shape of batch and number of threads."""

    def workloads(self) -> list[Workload]:
        return [Workload(batch, length) for length in self.lengths for batch in (1, *self.batches)]


@dataclass(frozen=True)
class Compared:
    """A model in one format, with what is known of it besides time."""

    subject: Subject
    model: str
    format: str
    random_weights: bool = False
    metrics: dict[str, float] | None = None
    """On the test split."""

    @property
    def bytes(self) -> int:
        """Of the weights, and of the graph where there is one."""
        path = self.subject.path
        files = path.parent.glob(f"{path.stem}.*") if path.is_file() else path.glob("*.safetensors")
        return sum(file.stat().st_size for file in files)


def benchmark_run(run: Run, effort: Effort) -> dict[str, Any]:
    """Teacher and student of a finished run, in PyTorch and in each format that the student was exported to.

    The teacher is exported to the same formats for the comparison, whatever int8 costs it, and not kept.

    Raises:
        UserError: general distillation alone: its models have no answers to compare.
    """
    if run.config.task is None:
        raise UserError(f"benchmark: {run.folder} has no task, so its models give no answers. Compare with --models.")
    longest = max(effort.lengths)
    for who, config in (("teacher", run.checkpoint.config), ("student", run.student_config())):
        _require_positions(who, config, longest)
    formats = [name for name in FORMATS if (artefacts_folder(run) / name / model_file(name)).is_file()]
    if "openvino" in formats:
        require_packages("benchmark of the openvino artefact", OPENVINO, extra="openvino")
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        teacher = run.load_task_teacher().cpu()
        teacher.save_pretrained(folder / "teacher")
        if formats:
            Workshop(run, run.teacher_encoded, teacher, folder).make(formats, max_int8_loss_points=100.0)
        student = run.task.auto_class.from_pretrained(run.folder / "student")
        compared = [
            *_of_run(run, "teacher", run.teacher_encoded, teacher, folder / "teacher", folder, formats),
            *_of_run(run, "student", run.encoded, student, run.folder / "student", artefacts_folder(run), formats),
        ]
        figures = _benchmark(compared, effort, run.metric)
    figures["measured"] = measured_files(run.folder)
    write_json(run.folder / FILE, figures)
    return figures


def _of_run(
    run: Run, name: str, rows: Encoded, model: PreTrainedModel, saved: Path, artefacts: Path, formats: Sequence[str]
) -> Iterable[Compared]:
    def compared(label: str, path: Path, given: Any) -> Compared:
        metrics = rows.score(rows.logits(given, "test"), "test")
        subject = Subject(f"{name} {label}", path, model.config.vocab_size, run.task.auto_class.__name__)
        return Compared(subject, name, label, metrics=metrics)

    yield compared("pytorch", saved, model)
    for label in formats:
        file = artefacts / label / model_file(label)
        yield compared(label, file, ArtefactModel(file, model.config, torch.get_num_threads()))


def benchmark_models(names: Sequence[str], effort: Effort, folder: Path) -> dict[str, Any]:
    """Any models: checkpoints, or shapes with random weights, each in PyTorch, ONNX and int8.

    Only time, memory and bytes are compared: there are no rows, and int8's ranges are those of random token ids.

    Raises:
        UserError: a name that is neither a checkpoint nor a shape, or a length for which a model has no positions.
    """
    for name in names:
        _require_model(name, max(effort.lengths))
    with TemporaryDirectory() as scratch:
        compared: list[Compared] = []
        for index, name in enumerate(names):
            compared += _of_model(name, Path(scratch) / str(index))
        figures = _benchmark(compared, effort, None)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE, figures)
    return figures


def _shape(name: str) -> PreTrainedConfig | None:
    """The config of a shape; None for what is no shape."""
    numbers = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)", SHAPES.get(name, name))
    if numbers is None:
        return None
    layers, width, inner, heads = map(int, numbers.groups())
    if 0 in (layers, width, inner, heads) or width % heads:
        raise UserError(f"--models: {name}: the width must be a multiple of the heads, and no number 0.")
    return BertConfig(num_hidden_layers=layers, hidden_size=width, intermediate_size=inner, num_attention_heads=heads)


def _require_model(name: str, length: int) -> None:
    """Raises UserError for what is no model, and for lengths that it has no positions for."""
    try:
        config = _shape(name) or AutoConfig.from_pretrained(resolve(name))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--models: {name} is no checkpoint that can be opened and no shape. Give a folder or hub name, one of "
            f"{', '.join(SHAPES)}, or LAYERSxWIDTHxINNERxHEADS, for instance 4x312x1200x12."
        ) from error
    _require_positions(name, config, length)


def _require_positions(name: str, config: PreTrainedConfig, length: int) -> None:
    most = positions(config)
    if most is not None and length > most:
        raise UserError(f"--lengths: {name} has positions for {most} pieces, not for {length}. Give shorter ones.")


def _of_model(name: str, folder: Path) -> Iterable[Compared]:
    torch.manual_seed(0)
    auto_class, shape = AutoModelForSequenceClassification, _shape(name)
    model = auto_class.from_pretrained(resolve(name)) if shape is None else auto_class.from_config(shape)
    model = model.float().eval()
    weights = folder / "pytorch"  # apart, as what lies beside a graph under its name counts as a part of it
    model.save_pretrained(weights)
    ids = torch.randint(model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    export_graph(model, batch, folder / MODEL_FILE)
    rows = [{name: tensor[[row]].numpy() for name, tensor in model_inputs(model, batch).items()} for row in (0, 1)]
    seen = ranges(folder / MODEL_FILE, rows)
    files = {"onnx": folder / MODEL_FILE}
    for recipe in ("dynamic", "static_largest"):  # static_mean is the same arithmetic
        files[f"int8 {recipe}"] = folder / f"{recipe}.onnx"
        quantize(folder / MODEL_FILE, recipe, seen, files[f"int8 {recipe}"])
    vocabulary = model.config.vocab_size
    yield Compared(Subject(f"{name} pytorch", weights, vocabulary), name, "pytorch", shape is not None)
    for label, file in files.items():
        yield Compared(Subject(f"{name} {label}", file, vocabulary), name, label, shape is not None)


def _benchmark(compared: Sequence[Compared], effort: Effort, metric: str | None) -> dict[str, Any]:
    subjects = [one.subject for one in compared]
    timed = {threads: measure(subjects, effort.workloads(), threads, effort.seconds) for threads in effort.threads}
    models = []
    for index, one in enumerate(compared):
        by_threads = {threads: found[index] for threads, found in timed.items()}
        models.append(
            {
                "name": one.subject.name,
                "model": one.model,
                "format": one.format,
                "random_weights": one.random_weights,
                "bytes": one.bytes,
                "peak_bytes": by_threads[effort.threads[0]].peak_bytes,
                "test": one.metrics,
                "latency": list(_latency(by_threads)),
                "throughput": list(_throughput(by_threads)),
            }
        )
    return {
        "metric": metric,
        "inputs": "random token ids, no padding; each model in a process of its own, measured in turn",
        "machine": machine(),
        "versions": {name: version(name) for name in PACKAGES},
        "models": models,
    }


def _latency(by_threads: dict[int, Timed]) -> Iterable[dict[str, Any]]:
    for threads, timed in by_threads.items():
        for workload, seconds in timed.seconds.items():
            if workload.batch == 1:
                p50, p95, p99 = (float(value) for value in np.percentile(np.array(seconds) * 1000, [50, 95, 99]))
                yield {
                    "threads": threads,
                    "length": workload.length,
                    "forwards": len(seconds),
                    "p50_ms": p50,
                    "p95_ms": p95,
                    "p99_ms": p99,
                }


def _throughput(by_threads: dict[int, Timed]) -> Iterable[dict[str, Any]]:
    for threads, timed in by_threads.items():
        for workload, seconds in timed.seconds.items():
            if workload.batch > 1:
                yield {
                    "threads": threads,
                    "batch": workload.batch,
                    "length": workload.length,
                    "forwards": len(seconds),
                    "rows_per_second": workload.batch * len(seconds) / sum(seconds),
                }
