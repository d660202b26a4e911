"""What a model card is made of: a run's settings and figures, and where teacher and data came from.
How it reads is left to body.py and metadata.py."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedConfig

from distill import teachers
from distill.augmentation import vectors
from distill.checkpoint import sha256_of
from distill.config import Config
from distill.data import EMBEDDED
from distill.initialization import BUILT_IN
from distill.teachers import weights_hash
from pipelines.run import Run

PACKAGES = ("tinybert-distill", "torch", "transformers", "tokenizers", "datasets", "accelerate")
BUILDERS = ("arrow", "csv", "json", "pandas", "parquet", "text")
"""What `datasets` reads files with."""


@dataclass(frozen=True)
class Facts:
    """All that is known of a run's student."""

    config: Config
    student: Mapping[str, Any]
    """Its config.json."""
    weights: Mapping[str, Any]
    """bytes and sha256 of model.safetensors."""
    origins: Mapping[str, Any]
    """See `origins`."""
    results: Mapping[str, Mapping[str, Any]]
    """result.json by stage."""
    artefacts: Mapping[str, Mapping[str, Any]]
    """Figures of the formats that lie in RUN/artefacts."""
    benchmark: Mapping[str, Any] | None
    """benchmark.json, where it is this student's."""

    @property
    def evaluated(self) -> Mapping[str, Any] | None:
        """Figures of the stage evaluate."""
        return self.results.get("evaluate")


def read_facts(config: Config, folder: Path) -> Facts | None:
    """Of a run folder; None where its student was not exported, or by a version that wrote no card."""
    results = dict(_results(folder))
    student = folder / "student"
    if "origins" not in results.get("export", {}) or not (student / "config.json").is_file():
        return None
    benchmark = _read(folder / "benchmark.json")
    if benchmark is not None and benchmark.get("measured") != measured_files(folder):
        benchmark = None  # of a student before this one, or of other artefacts
    file = student / "model.safetensors"
    return Facts(
        config,
        json.loads((student / "config.json").read_text(encoding="utf-8")),
        {"bytes": file.stat().st_size, "sha256": sha256_of(file)},
        results["export"]["origins"],
        results,
        {
            name: figures
            for name, figures in results["export"].get("artefacts", {}).items()
            if (folder / "artefacts" / name / "metadata.json").is_file()
        },
        benchmark,
    )


def measured_files(folder: Path) -> dict[str, str]:
    """Hashes by which a benchmark knows whose figures it has: of the student, and of each artefact."""
    graphs = sorted((folder / "artefacts").glob("*/model.onnx"))
    return {"student": weights_hash(str(folder / "student"))} | {file.parent.name: sha256_of(file) for file in graphs}


def _results(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in folder.glob("*/result.json"):
        if (found := _read(path)) is not None:
            yield path.parent.name, found


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # not there, or damaged: the run itself says so
    return found


def origins(run: Run) -> dict[str, Any]:
    """What only an open run can tell: shapes, counts, versions, and which of its names are public.

    A name is public where it stands for something packaged with this project or its dependencies, or for something on
    the hub; everything else is a path of this machine and nobody's business.
    """
    names = {"teacher.model": run.config.teacher.model, "student.initialization": run.config.student.initialization}
    if run.config.student.tokenizer is not None:
        names["student.tokenizer"] = run.config.student.tokenizer
    names["data.path"] = run.config.data.path
    if run.config.general is not None:
        names["general.corpus.path"] = run.config.general.corpus.path
    if run.config.task is not None and run.config.task.unlabelled is not None:
        names["task.unlabelled.path"] = run.config.task.unlabelled.path
    if run.config.augment is not None:
        given = {"masked_lm": run.config.augment.masked_lm, "vectors": run.config.augment.vectors}
        names |= {f"augment.{key}": name for key, name in given.items() if name is not None}
    found: dict[str, Any] = {
        "names": {key: kind for key, name in names.items() if (kind := kind_of(name)) is not None},
        "teacher": _shape(run.checkpoint.config),
        "layer_map": run.layer_map.describe(),
        "versions": dict(_versions()),
    }
    revision = getattr(run.checkpoint.config, "_commit_hash", None)
    if found["names"].get("teacher.model") == "hub" and revision is not None:
        found["teacher"]["revision"] = revision
    if run.config.task is not None:
        found["rows"] = {split: len(rows) for split, rows in run.data.splits.items()}
        found["labels"] = list(run.data.names)
        found["notes"] = list(run.data.notes)
        found["metric"] = run.metric
        found["pairs"] = "text_pair" in run.data.splits["train"].column_names
    return found


def kind_of(name: str) -> str | None:
    """packaged, builder (of `datasets`) or hub; None for a path.

    Asked where the name was opened successfully: what is no file here can only have come from the hub.
    """
    if name in BUILT_IN or name in EMBEDDED or name == "tiny-random":
        return "packaged"
    if name in teachers.PACKAGED or name in vectors.PACKAGED:
        return "packaged"
    if name in BUILDERS:
        return "builder"
    if Path(name).expanduser().exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return "hub"


def _shape(config: PreTrainedConfig) -> dict[str, Any]:
    return {"family": config.model_type, "layers": config.num_hidden_layers, "width": config.hidden_size}


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:  # this project runs from a checkout too
            continue
