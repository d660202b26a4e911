"""Claims about distill/evaluation.py: figures worked out by hand, and logits that come back in the rows' order."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from transformers import BertConfig

from distill import tiny
from distill.data import Collator
from distill.evaluation import METRICS, latency_ms, predict
from distill.tasks import TASKS
from tests.builders import uneven_lengths


def figures(metric: str, predictions: list[Any], references: list[Any]) -> dict[str, float]:
    return METRICS[metric]().compute(predictions=predictions, references=references)


def test_classification_by_hand() -> None:
    # Class 1: 2 right, 1 wrong, 1 missed. Class 0: 1 right, 1 wrong, 1 missed.
    found = figures("classification", [0, 1, 1, 1, 0], [0, 0, 1, 1, 1])
    assert found == pytest.approx(
        {"accuracy": 3 / 5, "f1": 2 / 3, "f1_macro": (2 / 3 + 1 / 2) / 2, "matthews": (2 * 1 - 1 * 1) / 6}
    )


def test_more_than_two_classes_have_no_f1_of_class_1() -> None:
    assert figures("classification", [0, 1, 2], [0, 1, 1]) == pytest.approx({"accuracy": 2 / 3, "f1_macro": 5 / 9})


def test_multi_label_by_hand() -> None:
    # Label a: 1 right, 1 wrong; b: 1 right, 1 missed; both together: 2 right, 1 wrong, 1 missed.
    found = figures("multi_label", [[1, 1], [1, 0], [0, 0]], [[1, 1], [0, 1], [0, 0]])
    assert found == pytest.approx({"f1_micro": 2 / 3, "f1_macro": 2 / 3, "accuracy": 2 / 3})


def test_regression_by_hand() -> None:
    found = figures("regression", [1.0, 3.0, 2.0], [1.0, 2.0, 3.0])
    assert found == pytest.approx({"pearson": 0.5, "spearman": 0.5, "mean_squared_error": 2 / 3})
    # Ranks agree where values do not: 0.5 and 4.5 about their means, (x - 2)(y - 3): 2 + 0 + 3 = 5.
    found = figures("regression", [1.0, 2.0, 3.0], [1.0, 2.0, 6.0])
    assert found == pytest.approx({"pearson": 5 / math.sqrt(2 * 14), "spearman": 1.0, "mean_squared_error": 3.0})


def test_a_constant_side_has_no_correlation_and_no_warning() -> None:
    found = figures("regression", [2.0, 2.0], [1.0, 3.0])
    assert found == {"pearson": 0.0, "spearman": 0.0, "mean_squared_error": 1.0}


def test_entities_count_whole_and_typed() -> None:
    true = [["B-A", "I-A", "O", "B-B"], ["O", "O"]]
    guessed = [["B-A", "I-A", "O", "B-A"], ["O", "B-B"]]
    # Three guesses, two entities, one right; four of the six tags are right.
    found = figures("entities", guessed, true)
    assert found == pytest.approx({"precision": 1 / 3, "recall": 1 / 2, "f1": 2 / 5, "accuracy": 4 / 6})
    half = figures("entities", [["B-A", "O", "O", "B-B"], ["O", "O"]], true)
    assert half["precision"] == half["recall"] == 1 / 2, "half an entity is none"


def test_spans_compare_as_squad_does() -> None:
    found = figures("spans", ["The cat, sat!", "cats", ""], [["cat sat"], ["a dog", "the cats"], [""]])
    assert found == {"f1": 1.0, "exact_match": 1.0}
    # "cat sat" against "cat": precision 1/2, recall 1; nothing against something: 0.
    found = figures("spans", ["cat sat", "dog", ""], [["cat"], [""], ["cow"]])
    assert found == pytest.approx({"f1": (2 / 3) / 3, "exact_match": 0.0})


def test_every_task_names_a_figure_that_its_metric_has() -> None:
    examples: dict[str, tuple[list[Any], list[Any]]] = {
        "classification": ([0, 1], [0, 1]),
        "multi_label": ([[0, 1], [1, 0]], [[0, 1], [1, 0]]),
        "regression": ([0.0, 1.0], [0.0, 1.0]),
        "entities": ([["B-A"]], [["B-A"]]),
        "spans": (["a b"], [["a b"]]),
    }
    for task in TASKS.values():
        assert figures(task.metric, *examples[task.metric])[task.primary] == pytest.approx(1)


class Echo(nn.Module):
    """Gives back its input pieces as logits: of every token, or of the first one."""

    device = torch.device("cpu")
    config = BertConfig()

    def __init__(self, by_token: bool) -> None:
        super().__init__()
        self.by_token = by_token
        self.widths: list[int] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        assert not torch.is_grad_enabled()
        assert not self.training
        self.widths.append(input_ids.shape[1])
        logits = input_ids[:, :, None].double()
        return {"logits": logits if self.by_token else logits[:, 0]}


@pytest.mark.parametrize("batch_size", [1, 7, 100])
@pytest.mark.parametrize("task", ["single_label_classification", "token_classification"])
def test_predictions_come_back_in_the_order_of_the_rows_without_padding(task: str, batch_size: int) -> None:
    lengths = uneven_lengths(40)
    ids = [[row, *range(100, 100 + length - 1)] for row, length in enumerate(lengths)]
    by_token = task == "token_classification"
    labels = [[0] * length for length in lengths] if by_token else [0] * 40
    features = Dataset.from_dict({"input_ids": ids, "labels": labels, "length": lengths})
    collator = Collator(tiny.tokenizer(), TASKS[task])
    found = predict(Echo(by_token).train(), features, collator, Accelerator(), batch_size)  # type: ignore[arg-type]
    expected = [np.array(row)[:, None] if by_token else np.array(row[:1]) for row in ids]
    assert len(found) == 40
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_latency_is_that_of_one_row_at_a_time() -> None:
    features = Dataset.from_dict({"input_ids": [[1] * 20] * 9, "labels": [0] * 9, "length": [20] * 9})
    model = Echo(by_token=False)
    collator = Collator(tiny.tokenizer(), TASKS["single_label_classification"])
    milliseconds = latency_ms(model, features, collator, rows=6)  # type: ignore[arg-type]
    assert 0 < milliseconds < 1000
    assert model.widths == [24] * (5 + 6)
