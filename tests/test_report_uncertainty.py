"""Claims about the interval of a report: the figures it resamples are the reported ones, and its width is right."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distill.evaluation import METRICS
from distill.tasks import TASKS
from pipelines.report.uncertainty import difference_interval, sums

ROWS = 60
CASES = [
    *(("single_label_classification", metric, 2) for metric in ("accuracy", "f1_macro", "f1", "matthews")),
    *(("single_label_classification", metric, 7) for metric in ("accuracy", "f1_macro")),
    *(("multi_label_classification", metric, 4) for metric in ("f1_micro", "f1_macro", "accuracy")),
    ("regression", "pearson", 0),
    *(("token_classification", metric, 5) for metric in ("f1", "precision", "recall", "accuracy")),
    *(("question_answering", metric, 0) for metric in ("f1", "exact_match")),
]
TAGS = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG"]
WORDS = ["the piano", "piano", "a song", "", "loud piano song"]


def made_up(task: str, labels: int, seed: int) -> tuple[list[Any], list[Any]]:
    """(predictions, references) of 60 rows, mostly right."""
    random = np.random.default_rng(seed)

    def draw() -> Any:
        if task == "single_label_classification":
            return int(random.integers(labels))
        if task == "multi_label_classification":
            return random.integers(2, size=labels).tolist()
        if task == "regression":
            return float(random.normal(5, 2))
        if task == "token_classification":
            return random.choice(TAGS, size=6).tolist()
        return str(random.choice(WORDS))

    gold = [draw() for _ in range(ROWS)]
    guessed = [true if random.random() < 0.6 else draw() for true in gold]
    return guessed, [[one] for one in gold] if task == "question_answering" else gold


def test_of(task: str, metric: str, labels: int, gold: list[Any], **predictions: list[Any]) -> Any:
    sides = tuple((who, SimpleNamespace(predictions=values)) for who, values in predictions.items())

    class Stub(SimpleNamespace):
        def __len__(self) -> int:
            return len(gold)

    names = tuple(map(str, range(labels)))
    return Stub(task=TASKS[task], metric=metric, references=gold, names=names, sides=lambda: sides)


test_of.__test__ = False  # type: ignore[attr-defined]


@pytest.mark.parametrize(("task", "metric", "labels"), CASES)
@pytest.mark.parametrize("rows", [ROWS, 7])
def test_figures_from_sums_are_the_reported_ones(task: str, metric: str, labels: int, rows: int) -> None:
    """The oracle is the project's metric, by scikit-learn, scipy and seqeval, on rows drawn with repetition."""
    predictions, gold = made_up(task, labels, seed=labels)
    chosen = np.random.default_rng(1).integers(ROWS, size=rows)
    found = sums(test_of(task, metric, labels, gold), predictions)
    assert found is not None
    contributions, figure = found
    weights = np.bincount(chosen, minlength=ROWS).astype(float)
    compute = METRICS[TASKS[task].metric]()
    expected = compute.compute(predictions=[predictions[i] for i in chosen], references=[gold[i] for i in chosen])
    assert float(figure(weights @ contributions)) == pytest.approx(expected[metric], abs=1e-9)


def test_a_rank_correlation_has_no_interval() -> None:
    predictions, gold = made_up("regression", 0, 0)
    assert difference_interval(test_of("regression", "spearman", 0, gold, teacher=predictions, student=gold)) is None


def test_width_is_that_of_a_paired_difference() -> None:
    """n rows, a where only the teacher is right, b where only the student is: mean (b - a) / n, and the standard error
    is sqrt((a + b - (b - a)^2 / n)) / n."""
    n, a, b = 400, 30, 10
    gold = [1] * n
    teacher = [1] * (n - b) + [0] * b
    student = [0] * a + [1] * (n - a)
    interval = difference_interval(
        test_of("single_label_classification", "accuracy", 2, gold, teacher=teacher, student=student)
    )
    assert interval is not None
    mean, error = (b - a) / n, np.sqrt(a + b - (b - a) ** 2 / n) / n
    assert interval == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.004)


def test_equal_answers_have_no_width() -> None:
    predictions, gold = made_up("single_label_classification", 3, 0)
    stub = test_of("single_label_classification", "f1_macro", 3, gold, teacher=predictions, student=list(predictions))
    assert difference_interval(stub) == (0.0, 0.0)
