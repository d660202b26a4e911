"""A card's metadata as the hub reads it: base model, data sets, metrics, and the figures as a model index.
The words for people are left to body.py."""

from __future__ import annotations

import math
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from distill.export.markdown import plain
from pipelines.card.facts import Facts
from pipelines.card.usage import pipeline_tag

METRICS = {
    "accuracy": "accuracy",
    "f1": "f1",
    "f1_macro": "f1",
    "f1_micro": "f1",
    "matthews": "matthews_correlation",
    "precision": "precision",
    "recall": "recall",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "mean_squared_error": "mse",
    "exact_match": "exact_match",
}
"""Our figures by the hub's names for them."""
TASKS = {
    "text-classification": "Text Classification",
    "token-classification": "Token Classification",
    "question-answering": "Question Answering",
    "feature-extraction": "Feature Extraction",
}
LANGUAGES = {"bbc_news": "en", "tiny": "en"}
"""Of the embedded sets."""


def model_name(facts: Facts) -> str:
    """The name given, without its owner, or the shape and what the student was distilled on."""
    given = facts.config.card.name
    if given is not None:
        return given.rpartition("/")[2]
    return "-".join(
        [f"tinybert-{facts.student['num_hidden_layers']}l-{facts.student['hidden_size']}", *_data_name(facts)]
    )


def _data_name(facts: Facts) -> list[str]:
    """The name of the data where others know it."""
    key = "data" if facts.config.task is not None else "general.corpus"
    if facts.origins["names"].get(f"{key}.path") in (None, "builder"):
        return []
    source = (
        facts.config.data
        if facts.config.task is not None or facts.config.general is None
        else facts.config.general.corpus
    )
    return [plain(part).replace("/", "-") for part in (source.path, source.name) if part is not None]


def metadata(facts: Facts) -> ModelCardData:
    """No path and no guess: what is not known is left out."""
    config, names = facts.config, facts.origins["names"]
    tag, figures = pipeline_tag(facts), student_figures(facts)
    sources = {"data.path": config.data.path} if config.task is not None else {}
    if config.general is not None:
        sources["general.corpus.path"] = config.general.corpus.path
    if config.task is not None and config.task.unlabelled is not None:
        sources["task.unlabelled.path"] = config.task.unlabelled.path
    return ModelCardData(
        model_name=model_name(facts) if figures else None,  # a part of the model index
        base_model=config.teacher.model if names.get("teacher.model") == "hub" else None,
        datasets=list(dict.fromkeys(path for key, path in sources.items() if names.get(key) == "hub")) or None,
        language=languages(facts) or None,
        license=config.card.license,
        library_name="transformers",
        pipeline_tag=tag,
        tags=["tinybert", "knowledge-distillation"],
        metrics=list(dict.fromkeys(METRICS[name] for name in figures)) or None,
        eval_results=[_result(facts, tag, name, value) for name, value in figures.items()] or None,
    )


def student_figures(facts: Facts) -> dict[str, float]:
    """On the test rows, by our names; the deciding one first, those that are no numbers left out."""
    if facts.evaluated is None:
        return {}
    metrics: dict[str, float] = facts.evaluated["student"]["metrics"]
    ordered = sorted(metrics.items(), key=lambda pair: pair[0] != facts.origins["metric"])
    return {name: value for name, value in ordered if math.isfinite(value)}


def languages(facts: Facts) -> list[str]:
    """Those that were given; else the embedded set's."""
    if facts.config.card.language:
        return list(facts.config.card.language)
    path = facts.config.data.path if facts.config.task is not None else None
    return [LANGUAGES[path]] if path in LANGUAGES else []


def _result(facts: Facts, tag: str, name: str, value: float) -> EvalResult:
    data = facts.config.data
    known = facts.origins["names"].get("data.path")
    details: dict[str, Any] = {}
    if known == "hub":
        details = {"dataset_config": data.name and plain(data.name), "dataset_split": tested_split(facts)}
    return EvalResult(
        task_type=tag,
        task_name=TASKS[tag],
        # The hub wants a type: of rows that are not public, what reads them.
        dataset_type=plain(data.path) if known else "local",
        dataset_name=plain(data.path) if known in ("hub", "packaged") else "rows that are not published",
        metric_type=METRICS[name],
        metric_name=name,
        metric_value=round(value, 4),
        **details,
    )


def tested_split(facts: Facts) -> str | None:
    """The source's own split that the figures are on; None where it was cut out of its training rows."""
    notes: list[str] = facts.origins["notes"]
    if any(note.endswith("test rows were held out of training") for note in notes):
        return None
    own = "validation" if "figures are on the source's validation split" in notes else "test"
    return plain((facts.config.data.splits or {}).get(own) or own)
