"""Whether an artefact says what the model says: logits within a tolerance, and every prediction.
Where the logits come from is left to the callers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TOLERANCE = 1e-4
"""By how much a float32 artefact's logits may differ: sums in another order, never another function."""


@dataclass(frozen=True)
class Agreement:
    """Of an artefact with the model it was made of, over some rows."""

    rows: int
    largest_difference: float
    """max |logit - logit|."""
    differing_predictions: int


def agreement(
    logits: Sequence[np.ndarray],
    model_logits: Sequence[np.ndarray],
    predictions: list[Any],
    model_predictions: list[Any],
) -> Agreement:
    """Compare row by row; of a regression the value is the logit, so it has no predictions that could differ."""
    pairs = zip(logits, model_logits, strict=True)
    largest = max(float(np.max(np.abs(np.asarray(own) - np.asarray(model)), initial=0.0)) for own, model in pairs)
    differing = sum(
        own != model for own, model in zip(predictions, model_predictions, strict=True) if not isinstance(model, float)
    )
    return Agreement(len(predictions), largest, differing)


def require_agreement(name: str, found: Agreement) -> None:
    """Raises RuntimeError where a float32 artefact is not the model it was made of."""
    # Not "greater than": that would let NaN pass.
    if not found.largest_difference <= TOLERANCE or found.differing_predictions:
        raise RuntimeError(
            f"{name}: over {found.rows:,} validation rows its logits differ from the student's by up to "
            f"{found.largest_difference:.2g} (at most {TOLERANCE:g} is float32's rounding) and "
            f"{found.differing_predictions:,} predictions differ; it was not kept"
        )
