"""The settings that a card shows: those that differ from the defaults, without a path, an address or an account.
Reading a whole config is left to distill/config.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from distill.config import Config, dump_values, to_plain

HIDDEN = "(not published)"
"""Stands where a setting names something that only its owner has."""
LEFT_OUT = frozenset({"preset", "output", "tracking", "project", "card", "runtime.logits_cache"})
"""Places and accounts of whoever ran it; the preset is written out in what differs from the defaults."""
FILES = frozenset({"data.data_files", "general.corpus.data_files", "task.unlabelled.data_files"})
NAMES = frozenset(
    {
        "teacher.model",
        "student.tokenizer",
        "student.initialization",
        "data.path",
        "general.corpus.path",
        "task.unlabelled.path",
        "augment.masked_lm",
        "augment.vectors",
    }
)
"""A path, or a name that others know too; see facts.kind_of."""


def recipe(config: Config, public: Mapping[str, str]) -> str:
    """YAML that repeats the run where what is hidden is put back.

    Args:
        public: the settings among NAMES whose values others know.
    """
    settings = _differences(config, "", public)
    if config.task is not None:  # without it a config leaves its phases to the preset
        settings.setdefault("task", {})["joint"] = config.task.joint
    shown = dump_values(settings)
    # What a reader's renderer would not show, or would turn around, is spelt out.
    return shown if shown.replace("\n", "").isprintable() else dump_values(settings, ascii_only=True)


def _differences(group: Any, prefix: str, public: Mapping[str, str]) -> dict[str, Any]:
    defaults = type(group)()
    found: dict[str, Any] = {}
    for field in dataclasses.fields(group):
        key, value, default = f"{prefix}{field.name}", getattr(group, field.name), getattr(defaults, field.name)
        if key in LEFT_OUT or value == default:
            continue
        if value is None:
            found[field.name] = None
        elif key in FILES or (key in NAMES and key not in public):
            found[field.name] = HIDDEN
        elif dataclasses.is_dataclass(value):
            # An empty group that is off by default switches it on.
            inner = _differences(value, f"{key}.", public)
            if inner or default is None:
                found[field.name] = inner
        else:
            found[field.name] = to_plain(value)
    return found
