"""A float32 graph in 8 bits, in several ways, and the choice among them by what was measured.
Measuring is left to the callers.

Matrices and embedding tables are stored in 8 bits with a scale for each output channel (tables: one scale); products
are of 8-bit integers, sums of 32-bit ones. Attention, LayerNorm and GELU stay float32. What a product reads is
quantised as it comes: dynamically, by the range of each tensor, or statically, by ranges read from calibration rows,
which saves a pass over each tensor and costs accuracy where a row's range is another.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from distill.settings import UserError

OPERATORS = ["MatMul", "Gemm", "Gather"]
"""What is quantised: layers, heads and embedding tables."""

SIMILAR = 0.03
"""Share of the fastest candidate's latency within which two are as fast as each other: timings repeat no better."""


@dataclass(frozen=True)
class Recipe:
    """One way into 8 bits. Activations are unsigned: on x86 the products of unsigned by signed have instructions."""

    static: bool
    weights: QuantType = QuantType.QInt8
    averaged: bool = False
    """Of static ranges: a moving average over calibration batches, so that one odd row does not widen them."""


RECIPES: Mapping[str, Recipe] = {
    "dynamic_signed": Recipe(static=False),
    # Without VNNI two products of an unsigned and a signed byte can saturate 16 bits; unsigned weights cannot.
    "dynamic_unsigned": Recipe(static=False, weights=QuantType.QUInt8),
    "static_range": Recipe(static=True),
    "static_average": Recipe(static=True, averaged=True),
}

Inputs = Mapping[str, np.ndarray]


class _Rows(CalibrationDataReader):
    def __init__(self, batches: Iterable[Inputs]) -> None:
        self.batches = iter(batches)

    def get_next(self) -> Any:
        return next(self.batches, None)


def quantize(graph: Path, recipe: Recipe, calibration: Sequence[Inputs], file: Path) -> None:
    """Write `graph` in 8 bits to `file`.

    Args:
        calibration: batches of the graph's inputs; only static recipes read them.
    """
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # advises, through the root logger, a preparation that this graph has behind it
    try:
        if recipe.static:
            quantize_static(
                graph,
                file,
                _Rows(calibration),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=OPERATORS,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=recipe.weights,
                extra_options={
                    "MatMulConstBOnly": True,
                    "CalibMovingAverage": recipe.averaged,
                    # Sums go on in float32: what follows a product is float32 anyway.
                    "OpTypesToExcludeOutputQuantization": OPERATORS,
                },
            )
        else:
            quantize_dynamic(
                graph,
                file,
                op_types_to_quantize=OPERATORS,
                per_channel=True,
                weight_type=recipe.weights,
                extra_options={"MatMulConstBOnly": True},
            )
    finally:
        root.setLevel(level)


@dataclass(frozen=True)
class Candidate:
    """An 8-bit graph as it was measured on the validation split."""

    name: str
    metric: float
    """The deciding figure, higher is better."""
    latency_ms: float
    bytes: int


def choose(candidates: Sequence[Candidate], metric: str, float32: float, max_loss_points: float) -> Candidate:
    """The fastest of those that lose at most `max_loss_points` hundredths of `metric` against `float32`.

    Of candidates as fast as the fastest (within SIMILAR) the one with the better figure, then the smaller one.

    Raises:
        UserError: every one loses more; the message says how much each does.
    """
    kept = [one for one in candidates if _loss_points(one, float32) <= max_loss_points + 1e-9]
    if not kept:
        told = ", ".join(f"{one.name} {one.metric:.4f} ({_loss_points(one, float32):.2f} lost)" for one in candidates)
        raise UserError(
            f"export.max_int8_loss_points: int8 may lose {max_loss_points:g} points of the validation {metric}, which "
            f"is {float32:.4f} in float32, and every way into int8 loses more: {told}. Raise the limit, or leave int8 "
            "out of export.to. No artefact was written."
        )
    fastest = min(one.latency_ms for one in kept)
    similar = [one for one in kept if one.latency_ms <= fastest * (1 + SIMILAR)]
    return min(similar, key=lambda one: (-one.metric, one.bytes, one.latency_ms))


def _loss_points(candidate: Candidate, float32: float) -> float:
    return 100 * (float32 - candidate.metric)
