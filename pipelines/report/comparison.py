"""Teacher against student on the test rows, by type of task: where they err, how sure they are, where they differ.
Running the models is left to answers.py, classes to decisions.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import multilabel_confusion_matrix, precision_recall_fscore_support

from distill.evaluation import exact_match, token_f1
from distill.losses import IGNORED, Logits
from pipelines.report import plots
from pipelines.report.answers import Answers, Test, probabilities
from pipelines.report.blocks import Answer, Block, Figure, Group, Missing, Row, Rows, Table, Text
from pipelines.report.calibration import reliability
from pipelines.report.decisions import Decisions, calibration, diagrams, errors

MOST_ROWS = 40
"""Disagreements that are given."""
OPEN_ROWS = 10
"""Those of them that are not folded away."""
MOST_LETTERS = 2000
"""Of a text that is shown."""
MOST_LABELS = 30
"""Labels drawn as bars."""


@dataclass(frozen=True)
class Comparison:
    errors: Sequence[Block]
    calibration: Sequence[Block]
    differing: Sequence[int]
    """Numbers of the test rows on which the models differ, in the order in which they are shown."""
    agreed: Sequence[int]
    """Of the others, in the order of the rows."""
    rows: Sequence[Row]
    order: str
    """In words, how `differing` is ordered."""


def compare(test: Test) -> Comparison:
    """The parts of a report that hang on the type of the task."""
    by_kind: dict[Logits, Callable[[Test], Comparison]] = {
        Logits.CLASSES: _classes,
        Logits.BINARIES: _labels,
        Logits.VALUE: _values,
        Logits.TOKEN_CLASSES: _tags,
        Logits.SPAN: _spans,
    }
    return by_kind[test.task.logits](test)


def disagreements(test: Test, found: Comparison) -> list[Block]:
    """The rows themselves, or that there are none."""
    share = f"{len(found.differing):,} of {len(test):,} test rows ({len(found.differing) / len(test):.1%})"
    if not found.differing:
        return [Missing(f"Teacher and student answer all {len(test):,} test rows alike: there is nothing to show.")]
    given = f" The first {len(found.rows)} are given." if len(found.rows) < len(found.differing) else ""
    blocks: list[Block] = [Text(f"They differ on {share}; {found.order}.{given} Rows are numbered from 0.")]
    blocks.append(Rows(found.rows[:OPEN_ROWS]))
    if more := found.rows[OPEN_ROWS:]:
        blocks.append(Rows(more, summary=f"{len(more)} more"))
    return blocks


def _comparison(
    test: Test,
    blocks: tuple[Sequence[Block], Sequence[Block]],
    differs: np.ndarray,
    weight: np.ndarray,
    order: str,
    row: Callable[[int], Row],
) -> Comparison:
    """differs: (N,) bool; weight: (N,), the greatest comes first."""
    differing = [int(index) for index in np.argsort(-weight, kind="stable") if differs[index]]
    agreed = [int(index) for index in np.flatnonzero(~differs)]
    return Comparison(*blocks, differing, agreed, [row(index) for index in differing[:MOST_ROWS]], order)


def percent(probability: float) -> str:
    """99.95 % and more is not rounded to certainty."""
    if probability >= 0.9995:
        return "> 99.9%"
    return "< 0.1%" if probability < 0.0005 else f"{probability:.1%}"


def texts(test: Test, index: int) -> list[tuple[str, str]]:
    """What of a canonical row is text, each with its name."""
    row = test.rows[index]
    if "tokens" in row:
        return [("text", shorten(" ".join(row["tokens"])))]
    return [
        (name.replace("_", " "), shorten(row[name]))
        for name in ("text", "text_pair", "question", "context")
        if name in row
    ]


def shorten(text: str) -> str:
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]}… ({len(text):,} characters)"


# One class a row


def _classes(test: Test) -> Comparison:
    teacher, student = (probabilities(np.stack(side.logits), Logits.CLASSES) for _, side in test.sides())
    gold = np.asarray(test.references)
    decisions = Decisions(gold, teacher, student, test.names, "rows")
    sides = (("teacher", teacher), ("student", student))

    def row(index: int) -> Row:
        answers = [
            Answer(
                who,
                test.names[int(probability[index].argmax())],
                percent(float(probability[index].max())),
                bool(probability[index].argmax() == gold[index]),
            )
            for who, probability in sides
        ]
        return Row(index, test.names[int(gold[index])], answers, texts(test, index))

    return _comparison(
        test,
        (errors(decisions), calibration(decisions)),
        teacher.argmax(1) != student.argmax(1),
        student.max(1),
        "those where the student is surest come first",
        row,
    )


# Several labels a row


def _labels(test: Test) -> Comparison:
    teacher, student = (probabilities(np.stack(side.logits), Logits.BINARIES) for _, side in test.sides())
    gold, chosen = np.asarray(test.references), {who: np.asarray(side.predictions) for who, side in test.sides()}
    found = {
        who: reliability(probability.ravel(), gold.ravel() == 1)
        for who, probability in (("teacher", teacher), ("student", student))
    }
    what = "the probability a model gives a label"

    def row(index: int) -> Row:
        differing = np.flatnonzero(chosen["teacher"][index] != chosen["student"][index])
        answers = [
            Answer(
                who,
                _label_set(chosen[who][index], test.names),
                "; ".join(f"{test.names[label]} {percent(float(probability[index, label]))}" for label in differing),
                bool((chosen[who][index] == gold[index]).all()),
            )
            for who, probability in (("teacher", teacher), ("student", student))
        ]
        return Row(index, _label_set(gold[index], test.names), answers, texts(test, index))

    differs = (chosen["teacher"] != chosen["student"]).any(1)
    # How far the student is from undecided on the labels that the teacher sees otherwise.
    sure = np.where(chosen["teacher"] != chosen["student"], np.abs(student - 0.5), 0).max(1)
    order = "those where the student is surest of a label that the teacher sees otherwise come first"
    return _comparison(
        test,
        (_label_errors(gold, chosen, test.names), diagrams(found, "labels", what)),
        differs,
        sure,
        order,
        row,
    )


def _label_set(chosen: np.ndarray, names: Sequence[str]) -> str:
    return ", ".join(names[int(label)] for label in np.flatnonzero(chosen)) or "no label"


def _label_errors(gold: np.ndarray, chosen: dict[str, np.ndarray], names: Sequence[str]) -> list[Block]:
    """Each label is a yes or no of its own, so each has a 2 x 2 matrix: a row of the table."""
    f1, missed, wrong = {}, {}, {}
    for who, predicted in chosen.items():
        f1[who] = precision_recall_fscore_support(gold, predicted, zero_division=0)[2]
        matrices = multilabel_confusion_matrix(gold, predicted)
        missed[who], wrong[who] = matrices[:, 1, 0], matrices[:, 0, 1]
    order = sorted(range(len(names)), key=lambda label: f1["student"][label] - f1["teacher"][label])
    drawn = order[:MOST_LABELS]
    figure = Figure(
        "F1 by label",
        plots.pairs_of_bars(
            "labels",
            "F1 of each label, teacher and student.",
            [names[label] for label in drawn],
            {who: [float(values[label]) for label in drawn] for who, values in f1.items()},
            "F1",
        ),
        ""
        if len(drawn) == len(order)
        else f"The {len(drawn)} labels, of {len(order)}, on which the student loses most.",
    )
    rows = [
        (
            names[label],
            f"{int(gold[:, label].sum()):,}",
            *(f"{f1[who][label]:.4f}" for who in chosen),
            *(f"{values[who][label]:,}" for values in (missed, wrong) for who in chosen),
        )
        for label in order
    ]
    heads = (
        "label",
        "rows",
        "teacher F1",
        "student F1",
        "teacher missed",
        "student missed",
        "teacher wrongly",
        "student wrongly",
    )
    note = "missed: the label is gold and was not given; wrongly: it was given and is not gold."
    return [Group([figure]), Table("By label", heads, rows, note)]


# A number a row


def _values(test: Test) -> Comparison:
    gold = np.asarray(test.references, dtype=np.float64)
    teacher, student = (np.asarray(side.predictions, dtype=np.float64) for _, side in test.sides())
    pairs = (
        ("teacher-gold", "Teacher against gold", gold, teacher, "gold", "teacher", "teacher"),
        ("student-gold", "Student against gold", gold, student, "gold", "student", "student"),
        ("student-teacher", "Student against teacher", teacher, student, "teacher", "student", "student"),
    )
    figures = [
        Figure(
            title,
            plots.scatter(
                name, f"{title}: {len(x)} points, mean distance {np.abs(y - x).mean():.4g}.", x, y, xlabel, ylabel, who
            ),
            f"Mean distance {np.abs(y - x).mean():.4g}; on the line both are the same.",
        )
        for name, title, x, y, xlabel, ylabel, who in pairs
    ]

    def row(index: int) -> Row:
        answers = [
            Answer(who, f"{values[index]:.4g}", f"off by {values[index] - gold[index]:+.4g}")
            for who, values in (("teacher", teacher), ("student", student))
        ]
        return Row(index, f"{gold[index]:.6g}", answers, texts(test, index))

    distance = np.abs(student - teacher)
    differs = distance > distance.mean()
    none = Missing("A number comes without a probability: calibration is for tasks with classes.")
    order = "that is, are further apart than on average; the widest apart come first"
    return _comparison(test, ([Group(figures)], [none]), differs, distance, order, row)


# A class for each word


def _tags(test: Test) -> Comparison:
    """Words that were cut off at max_length got no answer and are left out; the metric counts them as outside."""
    words = [_seen(test, side) for _, side in test.sides()]
    gold = np.concatenate([each[1] for each in words[0]])
    teacher, student = (np.concatenate([each[2] for each in side]) for side in words)
    decisions = Decisions(gold, teacher, student, test.names, "words")
    differing = [t[2].argmax(1) != s[2].argmax(1) for t, s in zip(*words, strict=True)]

    def row(index: int) -> Row:
        (places, true, t), (_, _, s) = words[0][index], words[1][index]
        tokens = test.rows[index]["tokens"]
        at = np.flatnonzero(differing[index])
        answers = [
            Answer(
                who,
                "; ".join(f"{tokens[places[one]]}: {test.names[int(p[one].argmax())]}" for one in at),
                ", ".join(percent(float(p[one].max())) for one in at),
                bool((p[at].argmax(1) == true[at]).all()),
            )
            for who, p in (("teacher", t), ("student", s))
        ]
        gold_tags = "; ".join(f"{tokens[places[one]]}: {test.names[int(true[one])]}" for one in at)
        return Row(index, gold_tags, answers, texts(test, index))

    surest = np.array(
        [s[2].max(1)[own].max() if own.any() else 0.0 for s, own in zip(words[1], differing, strict=True)]
    )
    return _comparison(
        test,
        (errors(decisions), calibration(decisions)),
        np.array([own.any() for own in differing]),
        surest,
        "those with the word of which the student is surest come first; only words on which they differ are listed",
        row,
    )


def _seen(test: Test, side: Answers) -> list[tuple[list[int], np.ndarray, np.ndarray]]:
    """For each row: the places of the words that the model saw, their gold classes, their probabilities."""
    found = []
    columns = (side.features[name] for name in ("labels", "words"))
    for logits, labels, words in zip(side.logits, *columns, strict=True):
        first_pieces = np.flatnonzero(np.asarray(labels) != IGNORED)
        gold = np.asarray(labels)[first_pieces]
        found.append((list(words), gold, probabilities(logits[first_pieces], Logits.TOKEN_CLASSES)))
    return found


# An answer in a context


def _spans(test: Test) -> Comparison:
    f1 = {who: np.array(list(map(token_f1, side.predictions, test.references))) for who, side in test.sides()}
    exact = {who: np.array(list(map(exact_match, side.predictions, test.references))) for who, side in test.sides()}
    t, s = exact["teacher"], exact["student"]
    outcomes = {"both": t & s, "only the teacher": t & ~s, "only the student": ~t & s, "neither": ~t & ~s}
    rows = [(name, f"{of.sum():,}", f"{of.mean():.1%}") for name, of in outcomes.items()]
    marks = ((0.0, 0.0, "0"), (0.0, 0.5, "up to 0.5"), (0.5, 1.0 - 1e-9, "up to 1"), (1.0 - 1e-9, 1.0, "1"))

    def shares(values: np.ndarray) -> list[float]:
        return [float(((values > low) & (values <= high) if high else values == 0).mean()) for low, high, _ in marks]

    figure = Figure(
        "Answers by their token F1",
        plots.pairs_of_bars(
            "f1",
            "Share of the answers by token F1, teacher and student.",
            [label for _, _, label in marks],
            {who: shares(values) for who, values in f1.items()},
            "share of test rows",
        ),
        "0: no word of the answer; 1: all of it, and nothing else.",
    )

    def row(index: int) -> Row:
        gold = " / ".join(dict.fromkeys(test.references[index]))
        answers = [
            Answer(who, side.predictions[index] or "no answer", f"F1 {f1[who][index]:.2f}", bool(exact[who][index]))
            for who, side in test.sides()
        ]
        return Row(index, gold or "no answer", answers, texts(test, index))

    differs = np.array([a != b for a, b in zip(test.teacher.predictions, test.student.predictions, strict=True)])
    none = Missing("Calibration is for tasks with classes: a span is chosen out of all spans of a context.")
    order = "those where the student loses most F1 against the teacher come first"
    table = Table("Who answers exactly", ("exact match", "rows", "share"), rows)
    return _comparison(test, ([Group([figure]), table], [none]), differs, f1["teacher"] - f1["student"], order, row)


__all__ = ["Comparison", "compare", "disagreements"]
