"""How far the difference between student and teacher may be the choice of the test rows: a paired bootstrap.
The figures themselves are distill.evaluation's.

Every figure here is a function of sums over rows (right answers, true positives, products), so that a resample is a
weighted sum and a thousand of them one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from seqeval.metrics.sequence_labeling import get_entities

from distill.evaluation import exact_match, token_f1
from distill.losses import Logits
from pipelines.report.answers import Test

RESAMPLES = 2000
AT_ONCE = 100
"""Resamples whose weights are in memory together, (AT_ONCE, rows)."""

Figure = Callable[[np.ndarray], np.ndarray]
"""(..., K) sums -> (...,) figures."""


def difference_interval(test: Test, seed: int = 0) -> tuple[float, float] | None:
    """The middle 95 % of (student's figure - teacher's figure) over resampled test rows.

    Both models are asked about the same resample. None where the figure is no function of sums (a rank correlation).
    """
    parts = {who: sums(test, answers.predictions) for who, answers in test.sides()}
    found: list[np.ndarray] = []
    random = np.random.default_rng(seed)
    for _ in range(RESAMPLES // AT_ONCE):
        weights = random.multinomial(len(test), np.full(len(test), 1 / len(test)), size=AT_ONCE).astype(np.float64)
        both = {}
        for who, part in parts.items():
            if part is None:
                return None
            rows, figure = part
            both[who] = figure(weights @ rows)
        found.append(both["student"] - both["teacher"])
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    return float(low), float(high)


def sums(test: Test, predictions: Sequence[Any]) -> tuple[np.ndarray, Figure] | None:
    """What each row adds, (N, K) float64, and the deciding figure from the sums of it."""
    gold = test.references
    match test.task.logits, test.metric:
        case (Logits.CLASSES | Logits.BINARIES, "accuracy"):
            return _mean([guess == true for guess, true in zip(predictions, gold, strict=True)])
        case Logits.CLASSES, "f1_macro":
            classes = range(len(test.names))
            return _label_sums(_one_hot(predictions, classes), _one_hot(gold, classes)), _macro_f1_of_present
        case Logits.CLASSES, "f1":
            return _label_sums(_one_hot(predictions, [1]), _one_hot(gold, [1])), _micro_f1
        case Logits.CLASSES, "matthews":
            counts = _label_sums(_one_hot(predictions, [1]), _one_hot(gold, [1]))
            return np.column_stack([counts, np.ones(len(counts))]), _matthews
        case Logits.BINARIES, "f1_micro":
            return _label_sums(np.array(predictions), np.array(gold)), _micro_f1
        case Logits.BINARIES, "f1_macro":
            return _label_sums(np.array(predictions), np.array(gold)), lambda total: _f1_by_label(total).mean(-1)
        case Logits.VALUE, "pearson":
            return _products(np.array(predictions), np.array(gold)), _pearson
        case Logits.TOKEN_CLASSES, name:
            return np.array([_entities(*pair) for pair in zip(predictions, gold, strict=True)]), _entity_figure(name)
        case Logits.SPAN, "exact_match":
            return _mean(list(map(exact_match, predictions, gold)))
        case Logits.SPAN, "f1":
            return _mean(list(map(token_f1, predictions, gold)))
        case _:
            return None


def _mean(values: Sequence[Any]) -> tuple[np.ndarray, Figure]:
    rows = np.column_stack([np.array(values, dtype=np.float64), np.ones(len(values))])
    return rows, lambda total: total[..., 0] / total[..., 1]


def _one_hot(values: Sequence[int], classes: Sequence[int]) -> np.ndarray:
    return np.array(values)[:, None] == np.array(classes)


def _label_sums(guessed: np.ndarray, true: np.ndarray) -> np.ndarray:
    """(N, 3 C): true positives, guessed, gold, each by label."""
    guessed, true = guessed.astype(np.float64), true.astype(np.float64)
    return np.concatenate([guessed * true, guessed, true], axis=1)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """0 where the denominator is."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def _f1_by_label(total: np.ndarray) -> np.ndarray:
    hit, guessed, true = np.split(total, 3, axis=-1)
    return _ratio(2 * hit, guessed + true)


def _micro_f1(total: np.ndarray) -> np.ndarray:
    hit, guessed, true = (part.sum(-1) for part in np.split(total, 3, axis=-1))
    return _ratio(2 * hit, guessed + true)


def _macro_f1_of_present(total: np.ndarray) -> np.ndarray:
    _, guessed, true = np.split(total, 3, axis=-1)
    return _ratio(_f1_by_label(total).sum(-1), (guessed + true > 0).sum(-1).astype(np.float64))


def _matthews(total: np.ndarray) -> np.ndarray:
    hit, guessed, true, rows = np.moveaxis(total, -1, 0)
    spread = np.sqrt(guessed * (rows - guessed) * true * (rows - true))
    return _ratio(hit * rows - guessed * true, spread)


def _products(guessed: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Sums of a covariance, around the means of the whole set so that little cancels."""
    x, y = (values.astype(np.float64) - values.mean() for values in (guessed, true))
    return np.column_stack([x, y, x * x, y * y, x * y, np.ones(len(x))])


def _pearson(total: np.ndarray) -> np.ndarray:
    x, y, xx, yy, xy, rows = np.moveaxis(total, -1, 0)
    spread = np.sqrt(np.maximum(xx - x * x / rows, 0) * np.maximum(yy - y * y / rows, 0))
    return _ratio(xy - x * y / rows, spread)


def _entities(guessed: Sequence[str], true: Sequence[str]) -> list[float]:
    """Whole entities that are right, guessed, gold; words that are right, words."""
    guesses, golds = set(get_entities(list(guessed))), set(get_entities(list(true)))
    right = sum(guess == gold for guess, gold in zip(guessed, true, strict=True))
    return [len(guesses & golds), len(guesses), len(golds), right, len(true)]


def _entity_figure(name: str) -> Figure:
    def figure(total: np.ndarray) -> np.ndarray:
        hit, guessed, true, right, words = np.moveaxis(total, -1, 0)
        return {
            "f1": _ratio(2 * hit, guessed + true),
            "precision": _ratio(hit, guessed),
            "recall": _ratio(hit, true),
            "accuracy": _ratio(right, words),
        }[name]

    return figure
