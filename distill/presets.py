"""Recipes to start from: a preset puts values under a config's own. Reading YAML is left to config.py; docs/presets.md
shows them side by side.

A preset changes settings only: it switches no stage on, and whatever a config or an override says wins over it.
Sources: the paper is TinyBERT, arXiv 1909.10351; the code is huawei-noah/Pretrained-Language-Model, folder TinyBERT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PAPER_EPOCHS = {"cola": 50, "mnli": 10, "qqp": 10, "qnli": 10}
"""Of the intermediate phase, by data.name (sec. 4.2); 20 elsewhere."""
REFERENCE_COPIES = {"cola": 30, "mnli": 10, "mrpc": 30, "sst2": 20, "stsb": 30, "qqp": 10, "qnli": 20, "rte": 30}
"""N of data augmentation, by data.name (the code's data_augmentation.py); 20 elsewhere, as in the paper."""


def under_preset(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config's plain values with those of its preset under them. An unknown preset is left for validation."""
    recipes = {"default": _default, "paper": _paper, "reference": _reference}
    preset = values.get("preset", "default")
    recipe = recipes.get(preset) if isinstance(preset, str) else None
    return _merge(recipe(values), values) if recipe is not None else dict(values)


def _default(values: Mapping[str, Any]) -> dict[str, Any]:
    """Layers and logits in one phase, as docs/experiments.md found it; nothing where the config says which phases there
    are."""
    task = values.get("task")
    given = task if isinstance(task, Mapping) else {}
    if "intermediate" in given or "joint" in given or given.get("logits", {}) is None:
        return {}
    phase = {
        "epochs": 10,
        "batch_size": 16,
        "learning_rate": 1e-3,
        "balance": "gradient",
        "measure_gradients_every_steps": 50,
    }
    return {"task": {"intermediate": None, "joint": True, "logits": phase}}


def _paper(values: Mapping[str, Any]) -> dict[str, Any]:
    pair = _get(values, "data", "text_pair") is not None
    found: dict[str, Any] = {
        "student": {"initialization": "random", "projection": "separate_embedding"},
        "data": {"max_length": 128 if pair else 64},
        "task": {
            "intermediate": {
                "epochs": PAPER_EPOCHS.get(_data_name(values), 20),
                "batch_size": 32,
                "learning_rate": 5e-5,
            },
            "logits": {"epochs": 3, "batch_size": 32, "learning_rate": 3e-5},
            # "For STS-B and SQuAD the original training set is used" in the last phase.
            "augmented_logits": _get(values, "task", "type") not in ("regression", "question_answering"),
        },
        "general": {"max_length": 128, "training": {"epochs": 3, "batch_size": 256, "learning_rate": 1e-4}},
        "augment": {"mode": "exact", "copies": 20, "probability": 0.4, "candidates": 15},
    }
    return _on(found, values)


def _reference(values: Mapping[str, Any]) -> dict[str, Any]:
    # Means over padding belong to rows that are all padded to one length.
    layers: dict[str, Any] = {name: {"padding": "included"} for name in ("embedding", "attention", "hidden")}
    regression = _get(values, "task", "type") == "regression"
    predictions: dict[str, Any] = {"logits": None, "labels": {}} if regression else {"logits": {"form": "published"}}
    found: dict[str, Any] = {
        "teacher": {"dropout": True},
        "student": {"initialization": "random", "projection": "shared", "projection_bias": True},
        "data": {"max_length": 128, "padding": "max_length"},
        "task": {
            "losses": {**layers, **predictions},
            "intermediate": {
                "epochs": 10,
                "batch_size": 32,
                "learning_rate": 5e-5,
                "schedule": "constant",
                "warmup_fraction": 0,
            },
            "logits": {"epochs": 3, "batch_size": 32, "learning_rate": 3e-5},
            "augmented_logits": not regression,
        },
        "general": {
            "max_length": 128,
            "losses": layers,
            "training": {"epochs": 3, "batch_size": 256, "learning_rate": 5e-5},
        },
        "augment": {
            "mode": "exact",
            "copies": REFERENCE_COPIES.get(_data_name(values), 20),
            "probability": 0.4,
            "candidates": 15,
        },
    }
    return _on(found, values)


def _on(preset: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Without the stages that the config leaves off."""
    return {name: section for name, section in preset.items() if name in values or name not in ("general", "augment")}


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for name, value in over.items():
        below = merged.get(name)
        merged[name] = _merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _data_name(values: Mapping[str, Any]) -> str:
    """GLUE's name of the set; a value of another type is left for validation."""
    return str(_get(values, "data", "name"))


def _get(values: Any, *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values
