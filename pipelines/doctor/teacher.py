"""Checks of the teacher's answers: that it knows the task, and means the same labels as the data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
from datasets import Dataset
from scipy.optimize import linear_sum_assignment

from distill.losses import IGNORED, Logits
from pipelines.doctor.finding import Finding, Level
from pipelines.doctor.preflight import Preflight

FEW_ROWS = 50
"""Below this many rows a teacher's figure is never called certain."""


def check_teacher(preflight: Preflight) -> list[Finding]:
    """The teacher against the best answer that is the same for every row."""
    run = preflight.run
    if not preflight.teacher_is_ready:
        return [
            Finding(
                Level.NOTE,
                "teacher",
                "its head is not trained yet: its quality, its label order and the losses on its logits are unmeasured",
                "Run the teacher stage alone (--stages teacher) and then this again with the same --output.",
            )
        ]
    rows = preflight.held_out_rows
    figure = preflight.figure(preflight.logits)
    trivial = max(preflight.figure(logits) for logits in constant_logits(preflight.held_out, run.task.logits))
    message = f"{run.metric} {figure:.3f} on {rows:,} validation rows, {trivial:.3f} for {_CONSTANT[run.task.logits]}"
    # Two standard errors: of a share near the trivial figure, of a correlation that is 0.
    share = min(max(trivial, 1 / rows), 1 - 1 / rows)
    correlates = run.metric in ("pearson", "spearman", "matthews")
    margin = 2 * (1 if correlates else math.sqrt(share * (1 - share))) / math.sqrt(rows)
    if figure > trivial + margin or figure == 1:
        return [Finding(Level.OK, "teacher", message)]
    if figure > trivial:
        return [
            Finding(
                Level.WARNING,
                "teacher",
                f"{message}: no more than chance gives (plus or minus {margin:.3f})",
                "Fine-tune it first (teacher.training={epochs: 3}) or give a better one; where one answer is nearly "
                "always right, let another task.metric decide.",
            )
        ]
    certain = rows >= FEW_ROWS and figure < trivial - margin
    return [
        Finding(
            Level.ERROR if certain else Level.WARNING,
            "teacher",
            f"{message}: it does not beat it, and a student cannot learn more than it knows",
            "Fine-tune it on this task first (teacher.training={epochs: 3}), give one that is, or correct "
            f"{'data.labels' if run.task.has_names else 'data.label'} where they are not what it was trained on.",
        )
    ]


_CONSTANT = {
    Logits.CLASSES: "always the same class",
    Logits.BINARIES: "always the same labels",
    Logits.VALUE: "always the mean",
    Logits.TOKEN_CLASSES: "always the same tag",
    Logits.SPAN: "always no answer or the first token",
}


def constant_logits(features: Dataset, kind: Logits) -> Iterator[list[np.ndarray]]:
    """Logits of predictors that look at no text; the best of them is what a teacher must beat."""
    labels = features["labels"][:]
    if kind is Logits.CLASSES:
        # With two classes the F1 of class 1 may be best for the rarer one.
        count = max(labels) + 1
        for chosen in {*([0, 1] if count <= 2 else []), Counter(labels).most_common(1)[0][0]}:
            yield [np.eye(max(count, 2))[chosen]] * len(labels)
    elif kind is Logits.BINARIES:
        frequent = np.argsort(-np.mean(labels, axis=0), kind="stable")
        for count in range(min(len(frequent), 10) + 1):
            yield [np.where(np.isin(np.arange(len(frequent)), frequent[:count]), 1.0, -1.0)] * len(labels)
    elif kind is Logits.VALUE:
        yield [np.array([np.mean(labels)])] * len(labels)
    elif kind is Logits.TOKEN_CLASSES:
        counts = Counter(label for row in labels for label in row if label != IGNORED)
        chosen = counts.most_common(1)[0][0]
        yield [np.tile(np.eye(max(counts) + 1)[chosen], (len(row), 1)) for row in labels]
    else:
        windows = features["starts"][:]
        for first_of_context in (False, True):
            logits = []
            for starts in windows:
                at = next((index for index, start in enumerate(starts) if start >= 0), 0) if first_of_context else 0
                logits.append(np.where(np.arange(len(starts)) == at, 1.0, -1.0)[:, None].repeat(2, axis=1))
            yield logits


def check_label_order(preflight: Preflight) -> list[Finding]:
    """Whether the teacher's classes would agree with the data much better under other numbers."""
    run, names = preflight.run, preflight.run.data.names
    if not run.task.has_names or not preflight.teacher_is_ready:
        return []
    table, compared = agreement_table(preflight.logits, preflight.held_out, run.task.logits, names)
    # Renumbered, a teacher that knows nothing agrees as often as one that always says the most frequent class.
    trivial = 0.0 if run.task.logits is Logits.BINARIES else float(table.sum(0).max())
    given = float(np.trace(table))
    # The diagonal wins ties: a class that never occurs keeps its number.
    teacher_classes, data_classes = linear_sum_assignment(table + 1e-9 * np.eye(len(names)), maximize=True)
    permuted = float(table[teacher_classes, data_classes].sum())
    own = run.task_teacher.config.id2label
    unnamed = all(str(name) == f"LABEL_{index}" for index, name in own.items())
    how = "the teacher's are unnamed; " if unnamed else ""
    message = f"{how}teacher and data agree on {given:.0%} of {compared:,} validation labels"
    margin = max(0.1, 2 / math.sqrt(max(compared, 1)))
    if permuted <= given + margin or permuted <= trivial + margin / 2:
        return [Finding(Level.OK, "label order", message)]
    moved = [
        f"the teacher's class {teacher} ({own[int(teacher)]}) looks like the data's class {data} ({names[data]})"
        for teacher, data in zip(teacher_classes, data_classes, strict=True)
        if teacher != data and table[teacher, data] > 0
    ]
    order = ", ".join(names[data] for data in data_classes)
    if all(name == str(index) for index, name in enumerate(names)):
        changes = ", ".join(f"{data} -> {teacher}" for teacher, data in enumerate(data_classes) if teacher != data)
        remedy = f"Renumber the data's labels in the teacher's order: {changes}."
    else:
        remedy = (
            f"Give data.labels in the teacher's order: data.labels=[{order}]; where the label column holds numbers, "
            "renumber those as well."
        )
    certain = compared >= FEW_ROWS and permuted >= 0.75 and given <= permuted / 2
    return [
        Finding(
            Level.ERROR if certain else Level.WARNING,
            "label order",
            f"{message}, on {permuted:.0%} under other numbers: {'; '.join(moved[:5])}"
            f"{f' and {len(moved) - 5} more' if len(moved) > 5 else ''}",
            remedy,
        )
    ]


def agreement_table(
    logits: Sequence[np.ndarray], features: Dataset, kind: Logits, names: Sequence[str]
) -> tuple[np.ndarray, int]:
    """(table, labels compared): table[i, j] (C, C) is how far the teacher's class i is the data's class j; the trace
    is the agreement, at most 1.

    Classes: the share of rows that the teacher calls i and the data j. Tokens: the same over tokens that are not
    tagged O, which would hide the others. Yes-or-no labels: F1 between the teacher's i and the data's j, over C.
    """
    labels = features["labels"][:]
    size = len(names)
    if kind is Logits.BINARIES:
        guessed, true = (np.stack(logits) > 0).astype(float), np.asarray(labels)
        both = guessed.T @ true
        return 2 * both / (guessed.sum(0)[:, None] + true.sum(0)[None, :]).clip(min=1) / size, len(labels)
    if kind is Logits.TOKEN_CLASSES:
        left_out = (IGNORED, names.index("O") if "O" in names else IGNORED)
        flat_logits = np.concatenate(list(logits))
        flat = np.array(list(chain.from_iterable(labels)))
        kept = ~np.isin(flat, left_out)
        guessed, true = flat_logits[kept].argmax(-1), flat[kept]
    else:
        guessed, true = np.stack(logits).argmax(-1), np.asarray(labels)
    table = np.zeros((size, size))
    np.add.at(table, (guessed, true), 1)
    return table / max(len(true), 1), len(true)
