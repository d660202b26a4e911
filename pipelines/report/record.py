"""What a run folder tells without its models: summary.json, the stages' result.json, metrics.jsonl, benchmark.json.
What the models say of the test rows is left to answers.py."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.settings import UserError
from pipelines.pipeline import NAMES


@dataclass
class Training:
    """What was logged of one training: figure -> step -> value; the last value where a step was logged twice."""

    name: str
    train: dict[str, dict[int, float]] = field(default_factory=dict)
    validation: dict[str, dict[int, float]] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    """Seconds since the epoch, of each row."""

    @property
    def losses(self) -> dict[str, dict[int, float]]:
        """The total, and each term before its weight."""
        others = ("gradient_norm", "learning_rate", "tokens_per_second")
        return {name: points for name, points in self.train.items() if name not in others and "/" not in name}

    @property
    def tokens_per_second(self) -> float | None:
        """The median of what was logged."""
        logged = self.train.get("tokens_per_second")
        return statistics.median(logged.values()) if logged else None


@dataclass(frozen=True)
class Record:
    summary: Mapping[str, Any]
    results: Mapping[str, Mapping[str, Any]]
    """Stage -> its result.json, in the order of the stages; only finished ones."""
    trainings: Mapping[str, Training]
    """By the name in the log, in the order in which they began."""
    benchmark: Mapping[str, Any] | None


def read_record(folder: Path) -> Record:
    """Read a run folder.

    Raises:
        UserError: a file is damaged.
    """
    results = {name: _read(folder / name / "result.json") for name in NAMES}
    return Record(
        _read(folder / "summary.json") or {},
        {name: result for name, result in results.items() if result is not None},
        read_trainings(folder / "metrics.jsonl"),
        _read(folder / "benchmark.json"),
    )


def read_trainings(path: Path) -> dict[str, Training]:
    """Every training in metrics.jsonl; a row that a kill cut off, and figures that are not finite, are passed over."""
    trainings: dict[str, Training] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            training = trainings.setdefault(row["stage"], Training(row["stage"]))
            training.times.append(row["time"])
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                continue
            raise _damaged(path, f"line {number} is no row of figures") from None
        for name, value in row.items():
            kind, _, figure = name.partition("/")
            if kind in ("train", "validation") and value is not None:
                series = training.train if kind == "train" else training.validation
                series.setdefault(figure, {})[row["step"]] = value
    return trainings


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise _damaged(path, "it is not JSON") from None
    if not isinstance(value, dict):
        raise _damaged(path, "it is no mapping")
    return value


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: damaged: {what}. Restore it, or remove it: the report then does without.")
