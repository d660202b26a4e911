"""What an artefact's folder says of itself, in metadata.json: what the model does, what it was measured to do, what
its files must hash to."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distill.checkpoint import sha256_of, write_json
from distill.export.options import OPENVINO
from distill.export.session import METADATA_FILE

PACKAGES = ("torch", "transformers", "tokenizers", "onnx", "onnxruntime", "onnxscript")


def write_metadata(folder: Path, values: Mapping[str, Any]) -> None:
    """Write `values`, then files (name -> bytes, sha256) and versions, beside the files, which must be complete."""
    files = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    packages = [*PACKAGES, *(OPENVINO if values["format"] == "openvino" else ())]
    versions = {name: version(name) for name in packages}
    write_json(folder / METADATA_FILE, {**values, "files": files, "versions": versions})
