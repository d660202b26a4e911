"""The student's artefacts in RUN/artefacts: made, read back, measured on the validation split, kept or refused.
How a graph is made and put into 8 bits is left to distill/export/."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from distill.activations import model_inputs
from distill.checkpoint import write_folder
from distill.evaluation import latency_ms
from distill.export.graph import export_graph
from distill.export.metadata import write_metadata
from distill.export.parity import Agreement, agreement, require_agreement
from distill.export.quantization import RECIPES, Candidate, choose, quantize, ranges
from distill.export.runtime import ArtefactModel
from distill.export.session import MODEL_FILE, model_file
from pipelines.encoded import Encoded
from pipelines.export import artefacts_folder
from pipelines.run import Run

ROUNDS = 5
"""How often each candidate's latency is measured, in turn with the others; the median counts."""


def write_artefacts(run: Run, student: Path) -> dict[str, Any]:
    """Make what export.to names of a saved student: all of it or, where one fails its check, nothing.

    Raises:
        UserError: int8 loses more than it may.
        RuntimeError: a float32 artefact does not say what the student says.
    """
    figures: dict[str, Any] = {}
    model = run.task.auto_class.from_pretrained(student)
    options = run.config.export

    def fill(folder: Path) -> None:
        figures.update(Workshop(run, run.encoded, model, folder).make(options.to, options.max_int8_loss_points))

    write_folder(artefacts_folder(run), fill)
    return figures


@dataclass(frozen=True)
class _Measured:
    """An artefact, read back, on the validation split."""

    metrics: dict[str, float]
    latency_ms: float
    agreement: Agreement


class Workshop:
    """Makes artefacts of `model`, which reads the pieces of `rows`, in `folder`."""

    def __init__(self, run: Run, rows: Encoded, model: PreTrainedModel, folder: Path) -> None:
        self.run, self.rows, self.model, self.folder = run, rows, model, folder
        self.logits = rows.logits(model, "validation")
        self.predictions = rows.predictions(self.logits, "validation")

    def make(self, formats: Collection[str], max_int8_loss_points: float) -> dict[str, Any]:
        """The figures of each artefact and, for int8, of each candidate."""
        work = self.folder / "work"
        work.mkdir()
        graph = work / MODEL_FILE
        sample = self.rows.features["validation"][[0, 0]]
        export_graph(self.model, self.rows.collator(sample, [0.0, 0.0]), graph)
        measured = self._measure({"onnx": graph})["onnx"]
        require_agreement("onnx", measured.agreement)
        figures: dict[str, Any] = {}
        if "openvino" in formats:
            figures["openvino"] = self._openvino(graph)
        if "int8" in formats:
            figures["int8"] = self._int8(graph, measured, max_int8_loss_points)
        if "onnx" in formats:
            figures["onnx"] = self._keep("onnx", graph, measured, {})
        shutil.rmtree(work)
        return figures

    def _openvino(self, graph: Path) -> dict[str, Any]:
        from distill.export.openvino import convert

        file = graph.with_name(model_file("openvino"))
        convert(graph, file)
        measured = self._measure({"openvino": file})["openvino"]
        require_agreement("openvino", measured.agreement)
        return self._keep("openvino", file, measured, {})

    def _int8(self, graph: Path, float32: _Measured, max_loss_points: float) -> dict[str, Any]:
        run = self.run
        calibration = ranges(graph, self._calibration_rows())
        files = {name: graph.with_name(f"{name}.onnx") for name in RECIPES}
        for name, file in files.items():
            quantize(graph, name, calibration, file)
        measured = self._measure({"float32": graph, **files})
        candidates = [
            Candidate(name, measured[name].metrics[run.metric], measured[name].latency_ms, file.stat().st_size)
            for name, file in files.items()
        ]
        best = choose(candidates, run.metric, float32.metrics[run.metric], max_loss_points)
        more = {
            "recipe": best.name,
            "candidates": [asdict(one) for one in candidates],
            "float32": {"metric": float32.metrics[run.metric], "latency_ms": measured["float32"].latency_ms},
        }
        return self._keep("int8", files[best.name], measured[best.name], more)

    def _calibration_rows(self) -> Iterator[dict[str, np.ndarray]]:
        """Training rows drawn at random, one at a time: padding is nothing a range should hold."""
        run = self.run
        features = self.rows.features["train"].shuffle(seed=run.config.seed)
        for index in range(min(run.config.export.calibration_rows, len(features))):
            batch = self.rows.collator(features[[index]], [0.0])
            yield {name: tensor.numpy() for name, tensor in model_inputs(self.model, batch).items()}

    def _measure(self, files: Mapping[str, Path]) -> dict[str, _Measured]:
        """Load each back; timings go round, so that what else the machine does falls on all alike."""
        threads = torch.get_num_threads()
        models = {name: ArtefactModel(file, self.model.config, threads) for name, file in files.items()}
        features = self.rows.features["validation"]
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(ROUNDS):
            for name, model in models.items():
                times[name].append(latency_ms(model, features, self.rows.collator, rows=20))
        found = {}
        for name, model in models.items():
            logits = self.rows.logits(model, "validation")
            predictions = self.rows.predictions(logits, "validation")
            found[name] = _Measured(
                self.rows.score(logits, "validation"),
                float(np.median(times[name])),
                agreement(logits, self.logits, predictions, self.predictions),
            )
        return found

    def _keep(self, name: str, file: Path, measured: _Measured, more: Mapping[str, Any]) -> dict[str, Any]:
        """Put the file, the config and the tokenizer into a folder, with what is known of them."""
        run, config = self.run, self.model.config
        folder = self.folder / name
        folder.mkdir()
        parts = [file, *([file.with_suffix(".bin")] if name == "openvino" else [])]
        for part in parts:
            part.rename(folder / (model_file(name) if part is file else part.name))
        config.save_pretrained(folder)
        self.rows.tokenizer.save_pretrained(folder)
        figures = {
            "validation": measured.metrics,
            "validation_rows": len(run.data.splits["validation"]),
            "agreement": asdict(measured.agreement),
            "latency_ms": measured.latency_ms,
            **more,
        }
        write_metadata(
            folder,
            {
                "format": name,
                "task": run.task.name,
                "labels": list(run.data.names),
                "max_length": run.config.data.max_length,
                "pairs": bool({"text_pair", "context"} & set(run.data.splits["train"].column_names)),
                "metric": run.metric,
                **figures,
            },
        )
        return {**figures, "bytes": sum(part.stat().st_size for part in folder.glob("model.*"))}
