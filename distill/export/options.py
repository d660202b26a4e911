"""Settings of the deployable student: what it is exported to beside its safetensors, and what its card says of it."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from distill.settings import UserError, settings

FORMATS = ("onnx", "int8", "openvino")
"""What a student can be exported to, in the order in which it is made."""

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
"""What ONNX files need; the extra `export` brings it."""

OPENVINO = ("openvino",)
"""What OpenVINO's files need beside them; the extra `openvino` brings it."""


@settings
class ExportOptions:
    to: list[Literal["onnx", "int8", "openvino"]] = dataclasses.field(default_factory=list)
    """Artefacts beside student/, in RUN/artefacts: onnx (float32), int8 (ONNX too), openvino (float32); empty for the
    safetensors alone."""
    max_int8_loss_points: float = Field(default=0.5, ge=0)
    """How many points (hundredths) of the deciding figure int8 may lose on the validation split."""
    calibration_rows: PositiveInt = 256
    """Training rows from which the ranges of static int8 are read."""


@settings
class CardOptions:
    name: str | None = Field(default=None, pattern=r"^[\w.-]+(/[\w.-]+)?$", max_length=96)
    """The model's name, or OWNER/NAME on the hub; `tinybert card --push` sets it. null: shape and data."""
    license: str | None = Field(default=None, pattern=r"^[a-z0-9][a-z0-9.-]*$")
    """The hub's id of a licence, for instance apache-2.0; null: the card names none."""
    language: list[Annotated[str, Field(pattern=r"^([a-z]{2,3}|multilingual)$")]] = dataclasses.field(
        default_factory=list
    )
    """ISO 639 codes of the texts' languages, for instance [en]; empty: the embedded set's own, else none is named."""
    artefacts: bool = False
    """Whether RUN/artefacts is published beside the student; `tinybert card --artefacts` sets it."""


def require_packages(asked_by: str, packages: Sequence[str] = PACKAGES, extra: str = "export") -> None:
    """Raises UserError where a package of an extra is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{asked_by} needs {', '.join(missing)}, which is not installed. Run `pip install "
            f"'tinybert-distill[{extra}]'`."
        )
