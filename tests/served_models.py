"""Artefacts of tiny models for the tests of serving, one for each task, and what transformers says of the same texts.
The oracle shares nothing with the server: pieces, padding and heads are those of transformers, decoding tasks/'s."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from distill import tiny
from distill.activations import read_logits
from distill.data import Collator, tokenize
from distill.export.graph import export_graph
from distill.export.metadata import write_metadata
from distill.export.session import MODEL_FILE
from distill.serving.answers import Answerer, Row, Served
from distill.tasks import TASKS

MAX_LENGTH = 24
NAMES = ["O", "B", "I"]
TEXTS = [
    "rain",
    "people often talk about the piano near our town every morning",
    "  snow,   wind & thunder!  ",
    "",
    "a long song before the concert " * 6,
    "naïve ümläuts 雪 🌧 \u0000 \t end",
    "<script>alert(1)</script>",
]
PAIRS = ["the choir", "storm and frost", "", "guitar " * 30, "our town", "new year", "cloud"]


@cache
def model_of(task: str) -> PreTrainedModel:
    labels = {"question_answering": 2, "regression": 1}.get(task, len(NAMES))
    config = AutoConfig.for_model(
        "bert",
        vocab_size=len(tiny.tokenizer()),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
        initializer_range=0.5,
        num_labels=labels,
        problem_type=TASKS[task].problem_type,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = TASKS[task].auto_class.from_config(config).eval()
    if task != "question_answering":
        # Random heads prefer one label whatever they read: without that the texts get different ones.
        seen = tiny.tokenizer()(TEXTS, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        with torch.inference_mode():
            logits = model(**seen).logits
        model.classifier.bias.data -= logits.reshape(-1, logits.shape[-1]).mean(dim=0)
    return model


def answerer_of(task: str) -> Answerer:
    """On an exported graph where heads differ in their outputs; on the model itself elsewhere, which saves the export
    (that graphs say what models say is test_export_graph.py's)."""
    if task in ("single_label_classification", "question_answering"):
        return Answerer.of_artefact(artefact_of(task), threads=1)
    model = model_of(task)

    def forward(inputs: dict[str, np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            return model(**{name: torch.from_numpy(array) for name, array in inputs.items()}).logits.numpy()

    names = tuple(NAMES if TASKS[task].has_names else [])
    takes = ("input_ids", "attention_mask", "token_type_ids")
    return Answerer(Served(task, names, MAX_LENGTH), tiny.tokenizer().backend_tokenizer, 0, takes, forward)


@cache
def artefact_of(task: str, pairs: bool | None = None) -> Path:
    """An artefact's folder, as `tinybert export` leaves it."""
    folder = Path(mkdtemp(prefix="tinybert-tests-")) / "onnx"
    folder.mkdir()
    model, tokenizer = model_of(task), tiny.tokenizer()
    export_graph(model, tokenizer(["rain", "snow"], padding=True, return_tensors="pt"), folder / MODEL_FILE)
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    labels = NAMES if TASKS[task].has_names else []
    write_metadata(folder, {"format": "onnx", "task": task, "labels": labels, "max_length": MAX_LENGTH, "pairs": pairs})
    return folder


def rows_of(task: str, pairs: bool = False) -> list[Row]:
    """Rows of all lengths, cut and not."""
    return list(zip(TEXTS, PAIRS if pairs or task == "question_answering" else [None] * len(TEXTS), strict=True))


def logits_of(task: str, given: list[Row]) -> tuple[list[np.ndarray], Dataset]:
    """Of each feature its logits by transformers, one at a time, and the features."""
    rows = Dataset.from_dict(_columns(task, given))
    features = tokenize(rows, TASKS[task], tiny.tokenizer(), MAX_LENGTH, "")
    tokenizer: PreTrainedTokenizerBase = tiny.tokenizer()
    collate, model, found = Collator(tokenizer, TASKS[task]), model_of(task), []
    for index in range(len(features)):
        batch = collate(features[[index]], [0.0])
        with torch.inference_mode():
            output = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")})
        logits = read_logits(output)[0].numpy()
        found.append(logits if logits.ndim == 1 else logits[: features["length"][index]])
    return found, features


def predictions_of(task: str, given: list[Row]) -> list[Any]:
    """What the evaluation of a run would take as predictions."""
    logits, features = logits_of(task, given)
    rows = Dataset.from_dict(_columns(task, given))
    return TASKS[task].decode(logits, features, rows, NAMES)[0]


def _columns(task: str, given: list[Row]) -> dict[str, list[Any]]:
    texts, pairs = [text for text, _ in given], [pair for _, pair in given]
    match task:
        case "question_answering":
            answers = [{"text": ["x"], "answer_start": [0]}] * len(given)
            return {"question": texts, "context": pairs, "answers": answers}
        case "token_classification":
            words = [text.split() for text in texts]
            return {"tokens": words, "tags": [[0] * len(own) for own in words]}
    label = {"regression": 0.0, "multi_label_classification": [0.0] * len(NAMES)}.get(task, 0)
    columns: dict[str, list[Any]] = {"text": texts, "label": [label] * len(texts)}
    return columns if pairs[0] is None else {**columns, "text_pair": pairs}
