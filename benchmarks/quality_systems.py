"""What learns in benchmarks/quality.py: our recipes and the peer. How one is trained and measured is left to
quality_cells.py, what it learns to quality_tasks.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from benchmarks.quality_tasks import SIZES, Size, Task

INTERMEDIATE_SHARE = 0.6
"""Of the budget, where a system has no opinion."""

Phases = Mapping[str, dict[str, Any]]
"""Training options by phase, without their length."""


@dataclass(frozen=True)
class System:
    """What learns. phases: their training options, without the length; shares: of the budget, by phase; losses: of
    task.losses; student: of the section student, beside its shape; task: further settings of that section; sections:
    whole sections of the config that no other field is about, for instance layer_map; general_steps: of general
    distillation beforehand, beside the budget; taught_by_task: whether the task's teacher teaches there, else the
    packaged one as it is; augment: the section of that name by task, or by type of task, of word vectors alone;
    keeps_answers: tasks whose rows, copies included, come more than once though Task.keeps_answers or copies say that
    they do not; unlabelled: collections of quality_texts.py by task, or by type of task, that they train on as well, as
    task.unlabelled; rates: peak
    rates of sizes that want another than phases has; seconds: budgets of its own by type of task, outside the
    comparison."""

    preset: str
    phases: Phases
    shares: Mapping[str, float]
    losses: Mapping[str, Any]
    student: Mapping[str, Any]
    task: Mapping[str, Any] = field(default_factory=dict)
    sections: Mapping[str, Any] = field(default_factory=dict)
    general_steps: int = 0
    taught_by_task: bool = False
    augment: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    keeps_answers: frozenset[str] = frozenset()
    unlabelled: Mapping[str, str] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def augment_of(self, task: Task) -> Mapping[str, Any] | None:
        return self.augment.get(task.name, self.augment.get(task.type))

    def unlabelled_of(self, task: Task) -> str | None:
        return self.unlabelled.get(task.name, self.unlabelled.get(task.type))

    def keeps_answers_of(self, task: Task) -> bool:
        return task.name in self.keeps_answers or (task.keeps_answers and self.augment_of(task) is None)


@dataclass(frozen=True)
class Peer:
    """TextBrewer's loops and losses; initialization: of the student that they train, which is left to their user."""

    initialization: str


_EPOCHS = {"paper": (20, 3), "reference": (10, 3)}
# The settings' own rates (5e-5, 3e-5) are TinyBERT's, for many epochs; this one is of docs/experiments.md.
_DEFAULT = System(
    "default",
    {
        "logits": {
            "learning_rate": 1e-3,
            "batch_size": 16,
            "balance": "gradient",
            "measure_gradients_every_steps": 50,
        }
    },
    {"logits": 1.0},
    {},
    {},
    {"joint": True},
    augment={"token_classification": {"copies": 10, "candidates": 100, "probability": 0.7}},
    rates={"tiny": 2e-3},
)
SYSTEMS: Mapping[str, System | Peer] = {
    "undistilled": System(
        "default",
        {"logits": {"learning_rate": 5e-4}},
        {"logits": 1.0},
        {"logits": None, "labels": {}},
        {"initialization": "random"},
    ),
    "default": _DEFAULT,
    # What a student keeps with more text and time, as users would give it: copies where rows are few, other sets' text
    # where entities are.
    "more-text": replace(
        _DEFAULT,
        augment={
            "trec": {"copies": 5},
            **{name: {"copies": 3} for name in ("mrpc", "stsb", "bbc_news")},
            **_DEFAULT.augment,
        },
        keeps_answers=frozenset({"trec", "mrpc", "stsb", "bbc_news", "agnews"}),
        unlabelled={"token_classification": "entities"},
        # Thirty minutes where after ten the students were at 0.95 and 0.88 of the teacher's validation figure; on the
        # other types they were at 0.97 or more.
        seconds={"single_label_classification": 600.0, "regression": 600.0, "token_classification": 1800.0},
    ),
    **{
        name: System(
            name,
            {"intermediate": {}, "logits": {}},
            {"intermediate": first / (first + last), "logits": last / (first + last)},
            {},
            {},
        )
        for name, (first, last) in _EPOCHS.items()
    },
    "textbrewer": Peer("random"),
    "textbrewer-cut": Peer("teacher"),
}
"""Students; the presets keep their own rates and the ratio of their phases' epochs."""


def recipe(system: str, size: str) -> str | None:
    """What a run of the system is stamped with: changed where anything about the system or the student's shape is, but
    not by a field that neither uses, nor by the budget, which runs tell; None of a teacher."""
    if system not in SYSTEMS:
        return None
    used = [_used(SYSTEMS[system]), _used(SIZES[size])]
    plain = json.dumps(used, sort_keys=True, default=sorted)
    return hashlib.sha256(plain.encode()).hexdigest()[:12]


def _used(what: System | Peer | Size) -> dict[str, Any]:
    """Fields that are not at their defaults, without the budget."""
    found = {own.name: getattr(what, own.name) for own in fields(what) if own.name != "seconds"}
    bare = {own.name: own.default_factory() if callable(own.default_factory) else own.default for own in fields(what)}
    return {name: value for name, value in found.items() if value != bare[name]}


def budget_of(system: str, task: Task) -> float | None:
    """Seconds of the system's own for the task; None where it has the comparison's."""
    own = SYSTEMS[system]
    return own.seconds.get(task.type) if isinstance(own, System) else None


def fits(system: str, size: str) -> bool:
    """Whether there is such a student: the peer compares what both models read piece by piece, and cannot map a cut
    vocabulary."""
    return not (isinstance(SYSTEMS[system], Peer) and "vocabulary" in SIZES[size].changes)
