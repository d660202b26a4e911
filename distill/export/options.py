"""Settings of the deployable student: what it is exported to beside its safetensors."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, PositiveInt

from distill.settings import UserError, settings

FORMATS = ("onnx", "int8")
"""What a student can be exported to, in the order in which it is made."""

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
"""What ONNX files need; the extra `export` brings it."""


@settings
class ExportOptions:
    to: list[Literal["onnx", "int8"]] = dataclasses.field(default_factory=list)
    """Artefacts beside student/, in RUN/artefacts: onnx (float32), int8 (ONNX too); empty for the safetensors alone."""
    max_int8_loss_points: float = Field(default=0.5, ge=0)
    """How many points (hundredths) of the deciding figure int8 may lose on the validation split."""
    calibration_rows: PositiveInt = 256
    """Training rows from which the ranges of static int8 are read."""


def require_packages(asked_by: str, packages: Sequence[str] = PACKAGES) -> None:
    """Raises UserError where a package of the extra `export` is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{asked_by} needs {', '.join(missing)}, which is not installed. Run `pip install "
            "'tinybert-distill[export]'`."
        )
