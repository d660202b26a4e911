"""The files of an artefact, and how this project opens them in ONNX Runtime and in OpenVINO.
No torch in here: a process that only answers need not load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime

MODEL_FILE, METADATA_FILE = "model.onnx", "metadata.json"
OPENVINO_FILE = "model.xml"
"""The weights lie beside it, in model.bin."""


def model_file(kind: str) -> str:
    """The file by which an artefact is opened; `kind` is one of FORMATS."""
    return OPENVINO_FILE if kind == "openvino" else MODEL_FILE


def open_session(file: Path, threads: int) -> onnxruntime.InferenceSession:
    """On the CPU; `threads` of one forward."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that spin while they wait slow down whatever else runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def compile_openvino(file: Path, threads: int) -> Any:
    """A compiled model of OpenVINO on the CPU in float32, which its plugin would else round to bf16; `threads` of one
    forward."""
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    return openvino.Core().compile_model(str(file), "CPU", options)
