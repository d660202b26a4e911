"""One of several classes, decided by two models: confusion matrices, classes, calibration.
A decision is a row where a row has a class, and a word where a word has one; which it is, is left to the callers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from pipelines.report import plots
from pipelines.report.blocks import Block, Figure, Group, Table, Tables, Text
from pipelines.report.calibration import BINS, Reliability, reliability

MOST_CLASSES = 60
"""Classes of the table of classes; of more, those with the greatest loss."""
MOST_CONFUSIONS = 10
MOST_COLUMNS = 40
"""Classes of a confusion matrix that is given as a table too."""


@dataclass(frozen=True)
class Decisions:
    gold: np.ndarray
    """(N,) numbers of classes."""
    teacher: np.ndarray
    """(N, C) probabilities."""
    student: np.ndarray
    names: Sequence[str]
    of: str
    """What was decided about, in the plural: rows, words."""

    def sides(self) -> tuple[tuple[str, np.ndarray], tuple[str, np.ndarray]]:
        return ("teacher", self.teacher), ("student", self.student)


def counts(gold: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """(C, C): [i, j] is how often gold class i was taken for class j."""
    classes = range(probability.shape[1])
    found: np.ndarray = confusion_matrix(gold, probability.argmax(1), labels=list(classes))
    return found


def errors(decisions: Decisions) -> list[Block]:
    """Confusion matrices of both, the commonest mistakes, the classes."""
    found = {who: counts(decisions.gold, probability) for who, probability in decisions.sides()}
    many = len(decisions.names) > plots.MOST_NAMES
    numbered = " Classes by number, in the order of the labels." if many else ""
    figures = [
        Figure(
            f"Confusion matrix of the {who}",
            plots.confusion(f"confusion-{who}", _alt(who, matrix, decisions), matrix, decisions.names, who),
            f"{np.trace(matrix):,} of {matrix.sum():,} {decisions.of} right. Shade: share of the gold class.{numbered}",
        )
        for who, matrix in found.items()
    ]
    tables = [_classes(decisions)]
    if mistakes := _mistakes(found, decisions.names):
        note = f"Number of {decisions.of}; those the student makes most often first."
        tables.append(Table("Commonest mistakes", ("gold, taken for", "teacher", "student"), mistakes, note))
    blocks: list[Block] = [Group(figures), Tables(tables)]
    if len(decisions.names) <= MOST_COLUMNS:
        heads = ("gold", *decisions.names)
        blocks += [
            Table(
                f"Confusion matrix of the {who}",
                heads,
                [(name, *(f"{count:,}" for count in row)) for name, row in zip(decisions.names, matrix, strict=True)],
                f"Columns: the class predicted by the {who}.",
                summary=f"Confusion matrix of the {who} as a table",
            )
            for who, matrix in found.items()
        ]
    return blocks


def _alt(who: str, matrix: np.ndarray, decisions: Decisions) -> str:
    return (
        f"Confusion matrix of the {who}: {np.trace(matrix)} of {matrix.sum()} {decisions.of} on the diagonal, "
        f"{len(decisions.names)} classes."
    )


def _mistakes(found: dict[str, np.ndarray], names: Sequence[str]) -> list[tuple[str, str, str]]:
    off = {who: matrix - np.diag(np.diag(matrix)) for who, matrix in found.items()}
    order = sorted(
        np.argwhere(off["student"] + off["teacher"]).tolist(),
        key=lambda at: (-off["student"][at[0], at[1]], -off["teacher"][at[0], at[1]], at),
    )
    return [
        (f"{names[i]} → {names[j]}", f"{off['teacher'][i, j]:,}", f"{off['student'][i, j]:,}")
        for i, j in order[:MOST_CONFUSIONS]
    ]


def _classes(decisions: Decisions) -> Table:
    """F1 of every class that occurs, those where the student loses most first."""
    labels = list(range(len(decisions.names)))
    f1: dict[str, np.ndarray] = {}
    support = np.zeros(len(labels), dtype=int)
    for who, probability in decisions.sides():
        figures = precision_recall_fscore_support(decisions.gold, probability.argmax(1), labels=labels, zero_division=0)
        f1[who], support = figures[2], figures[3]
    present = [label for label in labels if support[label]]
    present.sort(key=lambda label: f1["student"][label] - f1["teacher"][label])
    rows = [
        (
            decisions.names[label],
            f"{support[label]:,}",
            f"{f1['teacher'][label]:.4f}",
            f"{f1['student'][label]:.4f}",
            f"{f1['student'][label] - f1['teacher'][label]:+.4f}",
        )
        for label in present
    ]
    note = "Where the student loses most, first."
    if len(rows) > MOST_CLASSES:
        note = f"{note} {MOST_CLASSES} of {len(rows)} classes."
    if len(present) < len(labels):
        note = f"{note} {len(labels) - len(present)} classes do not occur in the test rows."
    heads = ("class", decisions.of, "teacher F1", "student F1", "difference")
    return Table("By class", heads, rows[:MOST_CLASSES], note)


def calibration(decisions: Decisions) -> list[Block]:
    """Reliability of the class that each model gives most probability."""
    found = {
        who: reliability(probability.max(1), probability.argmax(1) == decisions.gold)
        for who, probability in decisions.sides()
    }
    what = "the probability a model gives its own answer"
    return diagrams(found, decisions.of, what)


def diagrams(found: dict[str, Reliability], of: str, what: str) -> list[Block]:
    """A reliability diagram of each model under one sentence on how to read them."""
    lead = (
        f"If {what} can be trusted, bars end on the dashed line. ECE (expected calibration error) is the mean distance "
        f"to it over all {of}, in {BINS} equal bins; 0 is perfect."
    )
    figures = [
        Figure(
            f"{who.capitalize()}: ECE {one.expected_error:.4f}",
            plots.reliability_diagram(
                f"reliability-{who}",
                f"Reliability diagram of the {who}: expected calibration error {one.expected_error:.4f}.",
                one,
                who,
                of,
            ),
            f"{_direction(one)} The lower bars count the {of} in each bin.",
        )
        for who, one in found.items()
    ]
    return [Text(lead), Group(figures)]


def _direction(found: Reliability) -> str:
    points = found.overconfidence * 100
    if abs(points) < 0.5:
        return "On average it promises what it keeps."
    return f"On average it is too {'sure' if points > 0 else 'unsure'} by {abs(points):.1f} points."
