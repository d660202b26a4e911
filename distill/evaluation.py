"""Predictions to figures: running a model over a split, and the metrics. The only importer of `evaluate`.
What a prediction is, is left to tasks/."""

from __future__ import annotations

import re
import string
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset, Features, List, Value
from scipy.stats import pearsonr, spearmanr
from seqeval.metrics import accuracy_score as tag_accuracy
from seqeval.metrics import f1_score as entity_f1
from seqeval.metrics import precision_score, recall_score
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import PreTrainedModel

from distill.activations import model_inputs, read_logits
from distill.data import Collator, Placement
from distill.tasks import TaskType


class _Offline(evaluate.Metric):
    """A metric that lives here: `evaluate.load` would fetch its script from the hub."""

    predictions: Any
    references: Any

    def __init__(self, **options: Any) -> None:
        super().__init__(keep_in_memory=True, **options)

    def _info(self) -> evaluate.MetricInfo:
        features = Features({"predictions": self.predictions, "references": self.references})
        return evaluate.MetricInfo(description=self.__doc__ or "", citation="", features=features)


class Classification(_Offline):
    """accuracy; f1_macro over the classes that occur; for two classes also f1 (of class 1) and matthews."""

    predictions = references = Value("int64")

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        figures = {
            "accuracy": float(accuracy_score(references, predictions)),
            "f1_macro": float(f1_score(references, predictions, average="macro", zero_division=0)),
        }
        if set(references) | set(predictions) <= {0, 1}:
            figures["f1"] = float(f1_score(references, predictions, zero_division=0))
            figures["matthews"] = float(matthews_corrcoef(references, predictions))
        return figures


class MultiLabel(_Offline):
    """f1_micro and f1_macro over labels at probability one half; accuracy of the whole set of labels."""

    predictions = references = List(Value("int64"))

    def _compute(self, predictions: list[list[int]], references: list[list[int]]) -> dict[str, float]:
        guessed, true = np.array(predictions), np.array(references)
        return {
            "f1_micro": float(f1_score(true, guessed, average="micro", zero_division=0)),
            "f1_macro": float(f1_score(true, guessed, average="macro", zero_division=0)),
            "accuracy": float(accuracy_score(true, guessed)),
        }


class Regression(_Offline):
    """pearson and spearman correlation (0 where a side is constant), mean squared error."""

    predictions = references = Value("float64")

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        guessed, true = np.array(predictions), np.array(references)
        constant = np.ptp(guessed) == 0 or np.ptp(true) == 0
        return {
            "pearson": 0.0 if constant else float(pearsonr(guessed, true).statistic),
            "spearman": 0.0 if constant else float(spearmanr(guessed, true).statistic),
            "mean_squared_error": float(np.mean((guessed - true) ** 2)),
        }


class Entities(_Offline):
    """Entity-level precision, recall, f1 (CoNLL, by seqeval) and accuracy by tag."""

    predictions = references = List(Value("string"))

    def _compute(self, predictions: list[list[str]], references: list[list[str]]) -> dict[str, float]:
        return {
            "f1": float(entity_f1(references, predictions, zero_division=0)),
            "precision": float(precision_score(references, predictions, zero_division=0)),
            "recall": float(recall_score(references, predictions, zero_division=0)),
            "accuracy": float(tag_accuracy(references, predictions)),
        }


class Spans(_Offline):
    """SQuAD's exact_match and token f1, the best over a question's answers; "" is no answer."""

    predictions = Value("string")
    references = List(Value("string"))

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        pairs = list(zip(predictions, references, strict=True))
        return {
            "f1": float(np.mean([token_f1(guess, answers) for guess, answers in pairs])),
            "exact_match": float(np.mean([exact_match(guess, answers) for guess, answers in pairs])),
        }


METRICS: dict[str, type[_Offline]] = {
    "classification": Classification,
    "multi_label": MultiLabel,
    "regression": Regression,
    "entities": Entities,
    "spans": Spans,
}


def _normal(text: str) -> list[str]:
    """SQuAD's comparison: lower case, no punctuation, no articles, single spaces."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def exact_match(guess: str, answers: Sequence[str]) -> bool:
    """Whether one of a question's answers is the guess, by SQuAD's comparison."""
    return any(_normal(guess) == _normal(answer) for answer in answers)


def token_f1(guess: str, answers: Sequence[str]) -> float:
    """F1 of the guess's words against the best of a question's answers; 1 where both are empty."""
    return max(_token_f1(guess, answer) for answer in answers)


def _token_f1(guess: str, answer: str) -> float:
    guessed, true = _normal(guess), _normal(answer)
    if not guessed or not true:
        return float(guessed == true)
    shared = sum((Counter(guessed) & Counter(true)).values())
    return 2 * shared / (len(guessed) + len(true))


def predict(
    model: PreTrainedModel, features: Dataset, collator: Collator, accelerator: Accelerator, batch_size: int
) -> list[np.ndarray]:
    """Logits for every encoded row, in order, padding cut off; every process does a share and gets all of them.

    bf16 is not used: reported figures are those of the float32 model that is shipped.
    """
    placement = Placement(accelerator.num_processes, accelerator.process_index)
    found = predict_share(model, features, collator, batch_size, placement)
    everyone = gather_object(found) if accelerator.num_processes > 1 else found
    return [row for _, row in sorted(everyone, key=lambda pair: pair[0])]


def predict_share(
    model: PreTrainedModel, features: Dataset, collator: Collator, batch_size: int, placement: Placement
) -> list[tuple[int, np.ndarray]]:
    """One process's share of predict(): (number of the row, its logits), the longest rows first."""
    order = np.argsort(-np.asarray(features["length"][:]), kind="stable")
    columns = [name for name in ("input_ids", "token_type_ids", "labels") if name in features.column_names]
    rows = features.select_columns(columns)
    found: list[tuple[int, np.ndarray]] = []
    model.eval()
    with torch.inference_mode():
        for start in range(placement.rank * batch_size, len(order), batch_size * placement.processes):
            indices = order[start : start + batch_size]
            batch = collator(rows[indices], [0.0] * len(indices))
            inputs = {name: tensor.to(model.device) for name, tensor in model_inputs(model, batch).items()}
            logits = read_logits(model(**inputs)).float().cpu().numpy()
            lengths = batch["attention_mask"].sum(-1).tolist()
            by_token = logits.ndim == 3
            found += [
                (int(index), row[:length] if by_token else row)
                for index, row, length in zip(indices, logits, lengths, strict=True)
            ]
    return found


def evaluate_model(
    model: PreTrainedModel,
    features: Dataset,
    rows: Dataset,
    task: TaskType,
    names: Sequence[str],
    collator: Collator,
    accelerator: Accelerator,
    batch_size: int = 64,
) -> dict[str, float]:
    """The task's figures of `model` on one split."""
    logits = predict(model, features, collator, accelerator, batch_size)
    return score(logits, features, rows, task, names)


def score(
    logits: Sequence[np.ndarray], features: Dataset, rows: Dataset, task: TaskType, names: Sequence[str]
) -> dict[str, float]:
    """The task's figures of given logits."""
    predictions, references = task.decode(logits, features, rows, names)
    figures: dict[str, float] = METRICS[task.metric]().compute(predictions=predictions, references=references)
    return figures


def latency_ms(model: PreTrainedModel, features: Dataset, collator: Collator, rows: int = 50) -> float:
    """Median milliseconds of one forward at batch 1 over the first `rows` encoded rows, after five unmeasured ones."""
    columns = [name for name in ("input_ids", "token_type_ids", "labels") if name in features.column_names]
    sample = features.select_columns(columns).select(range(min(rows, len(features))))
    seconds = []
    model.eval()
    with torch.inference_mode():
        for index in [*range(min(5, len(sample))), *range(len(sample))]:
            batch = collator(sample[[index]], [0.0])
            inputs = {name: tensor.to(model.device) for name, tensor in model_inputs(model, batch).items()}
            began = time.perf_counter()
            model(**inputs)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[min(5, len(sample)) :]) * 1000)
