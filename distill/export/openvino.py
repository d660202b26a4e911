"""The student's ONNX graph as OpenVINO's files: model.xml and model.bin, weights in float32.
Opening them is left to session.py."""

from __future__ import annotations

from pathlib import Path

import openvino


def convert(graph: Path, target: Path) -> None:
    """Read an ONNX file and write `target` (.xml) with its weights beside it (.bin)."""
    model = openvino.Core().read_model(str(graph))
    openvino.save_model(model, str(target), compress_to_fp16=False)
