"""The files of an artefact, and how this project opens them in ONNX Runtime and in OpenVINO.
No torch in here: a process that only answers need not load it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
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


@dataclass(frozen=True)
class Runner:
    """An artefact that is open: names of its inputs and outputs, and run(inputs by name) -> outputs in their order."""

    takes: Sequence[str]
    gives: Sequence[str]
    run: Callable[[Mapping[str, np.ndarray]], Sequence[np.ndarray]]


def open_runner(file: Path, threads: int) -> Runner:
    """An artefact of any format, on the CPU; `threads` of one forward."""
    if file.name == OPENVINO_FILE:
        return _openvino_runner(file, threads)
    session = open_session(file, threads)
    return Runner(
        [given.name for given in session.get_inputs()],
        [given.name for given in session.get_outputs()],
        lambda inputs: session.run(None, inputs),
    )


def _openvino_runner(file: Path, threads: int) -> Runner:
    """In float32, which OpenVINO would else round to bf16 where the processor has it."""
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(str(file), "CPU", options)
    return Runner(
        [given.any_name for given in compiled.inputs],
        [given.any_name for given in compiled.outputs],
        lambda inputs: list(compiled(inputs).values()),
    )
