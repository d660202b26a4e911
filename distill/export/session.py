"""The files of an artefact, and a session of ONNX Runtime as this project opens it.
No torch in here: a process that only answers need not load it."""

from __future__ import annotations

from pathlib import Path

import onnxruntime

MODEL_FILE, METADATA_FILE = "model.onnx", "metadata.json"


def open_session(file: Path, threads: int) -> onnxruntime.InferenceSession:
    """On the CPU; `threads` of one forward."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that spin while they wait slow down whatever else runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
