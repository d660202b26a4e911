"""Whether a probability of 0.8 is right eight times in ten: bins of a reliability diagram, and the error over them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BINS = 10


@dataclass(frozen=True)
class Reliability:
    """Predictions by the probability they were given: bin b holds those in (b / bins, (b + 1) / bins]."""

    counts: np.ndarray
    """(bins,) predictions in each bin."""
    said: np.ndarray
    """(bins,) mean probability; NaN in an empty bin."""
    came_true: np.ndarray
    """(bins,) share that was right; NaN in an empty bin."""

    @property
    def expected_error(self) -> float:
        """ECE: sum_b n_b / N |came_true_b - said_b| (Guo et al. 2017, arXiv 1706.04599, eq. 3)."""
        filled = self.counts > 0
        gaps = np.abs(self.came_true[filled] - self.said[filled])
        return float((self.counts[filled] * gaps).sum() / self.counts.sum())

    @property
    def overconfidence(self) -> float:
        """Mean probability less the share that was right: positive where a model promises too much."""
        filled = self.counts > 0
        gaps = self.said[filled] - self.came_true[filled]
        return float((self.counts[filled] * gaps).sum() / self.counts.sum())


def reliability(probability: np.ndarray, right: np.ndarray, bins: int = BINS) -> Reliability:
    """Sort predictions into equal bins of probability.

    Args:
        probability: (N,), N > 0, of what was predicted.
        right: (N,) bool, whether it was so.
    """
    edges = np.linspace(0, 1, bins + 1)
    at = np.clip(np.searchsorted(edges, probability, side="left") - 1, 0, bins - 1)
    counts = np.bincount(at, minlength=bins)
    with np.errstate(invalid="ignore"):
        said = np.bincount(at, weights=probability, minlength=bins) / counts
        came_true = np.bincount(at, weights=np.asarray(right, dtype=np.float64), minlength=bins) / counts
    return Reliability(counts, said, came_true)
