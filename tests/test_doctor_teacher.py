"""Claims about the preflight's checks of the teacher: it knows the task, and means the labels that the data means."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distill.config import load_config
from distill.tasks import TASKS
from pipelines.doctor import Finding, Level, Preflight, teacher
from pipelines.pipeline import prepare
from pipelines.run import open_run
from tests.builders import finished_run
from tests.doctor_cases import (
    ROWS,
    Row,
    one_hot,
    only,
    preflight,
    save_teacher,
    several,
    splits,
    tagged,
    three_names,
    two_classes,
    words,
)


def test_a_teacher_that_beats_the_majority_is_fine(tmp_path: Path) -> None:
    looked_at = preflight(tmp_path, *splits(tmp_path, two_classes), ready=True)
    looked_at.logits = one_hot(looked_at.held_out["labels"][:])
    finding = only(teacher.check_teacher(looked_at))
    assert finding.level is Level.OK
    assert "accuracy 1.000 on 60 validation rows, 0.667 for always the same class" in finding.message


def test_a_teacher_that_says_the_same_of_every_row_is_warned_of(tmp_path: Path) -> None:
    looked_at = preflight(tmp_path, *splits(tmp_path, two_classes), ready=True)
    looked_at.logits = one_hot([1] * ROWS)
    finding = only(teacher.check_teacher(looked_at))
    assert finding.level is Level.WARNING
    assert "0.667 on 60" in finding.message
    assert "teacher.training" in finding.remedy


def test_a_teacher_within_chance_of_the_majority_is_warned_of(tmp_path: Path) -> None:
    looked_at = preflight(tmp_path, *splits(tmp_path, two_classes), ready=True)
    guesses = [1] * ROWS
    guesses[0] = 0  # one row better: 41 of 60
    looked_at.logits = one_hot(guesses)
    finding = only(teacher.check_teacher(looked_at))
    assert finding.level is Level.WARNING
    # Two standard errors of 2/3 over 60 rows.
    assert f"{2 * math.sqrt(2 / 9 / 60):.3f}" in finding.message
    assert "task.metric" in finding.remedy


def test_a_teacher_far_below_the_majority_is_an_error(tmp_path: Path) -> None:
    looked_at = preflight(tmp_path, *splits(tmp_path, two_classes), ready=True)
    looked_at.logits = one_hot([1 - label for label in looked_at.held_out["labels"][:]])
    finding = only(teacher.check_teacher(looked_at))
    assert finding.level is Level.ERROR
    assert "data.labels" in finding.remedy


def test_a_teacher_without_its_head_is_unmeasured_and_that_is_said(tmp_path: Path) -> None:
    finding = only(teacher.check_teacher(preflight(tmp_path)))
    assert finding.level is Level.NOTE
    assert "--stages teacher" in finding.remedy


def test_the_teacher_of_a_finished_stage_is_measured_unless_it_is_redone() -> None:
    config = load_config(finished_run() / "config.yaml", ["tracking=[]"])
    run = open_run(replace(config, output=str(finished_run())))
    assert Preflight(run, prepare(run)).teacher_is_ready
    assert Preflight(run, prepare(run, ["task"])).teacher_is_ready
    assert not Preflight(run, prepare(run, redo=["teacher"])).teacher_is_ready


def best_constant(looked_at: Preflight) -> float:
    kind = looked_at.run.task.logits
    return max(looked_at.figure(logits) for logits in teacher.constant_logits(looked_at.held_out, kind))


def test_the_constant_answer_knows_the_metric(tmp_path: Path) -> None:
    """Class 1 on a third of the rows: saying it always has precision 1/3 and recall 1, F1 1/2; saying 0 has none."""

    def rarely(index: int) -> Row:
        return {"text": words(index), "label": int(index % 3 == 0)}

    data = splits(tmp_path, rarely)
    assert best_constant(preflight(tmp_path, *data, "task.metric=f1")) == pytest.approx(0.5)
    assert best_constant(preflight(tmp_path, *data, "task.metric=matthews")) == 0
    assert best_constant(preflight(tmp_path, *data)) == pytest.approx(2 / 3)


def test_the_constant_number_correlates_with_nothing(tmp_path: Path) -> None:
    data = splits(tmp_path, lambda index: {"text": words(index), "label": index / 7})
    looked_at = preflight(tmp_path, *data, "task.type=regression")
    assert best_constant(looked_at) == 0
    assert looked_at.figure([np.array([value]) for value in looked_at.held_out["labels"][:]]) == pytest.approx(1)


def test_the_constant_tag_finds_no_entity(tmp_path: Path) -> None:
    looked_at = preflight(tmp_path, *splits(tmp_path, tagged), "task.type=token_classification")
    assert best_constant(looked_at) == 0
    looked_at = preflight(tmp_path, *splits(tmp_path, tagged), "task.type=token_classification", "task.metric=accuracy")
    assert best_constant(looked_at) == pytest.approx(4 / 6)


def test_the_constant_labels_are_those_most_rows_have(tmp_path: Path) -> None:
    """Label 0 always, label 1 on every second row, label 2 on every third."""
    data = splits(tmp_path, several)
    rows = np.array([[1, index % 2 == 0, index % 3 == 0] for index in range(ROWS, 2 * ROWS)])
    by_hand = []
    for answer in np.ndindex(2, 2, 2):
        shared = (rows * answer).sum()
        by_hand.append(2 * shared / (rows.sum() + ROWS * sum(answer)))
    assert best_constant(preflight(tmp_path, *data, "task.type=multi_label_classification")) == pytest.approx(
        max(by_hand)
    )


@pytest.mark.parametrize("answered", [True, False])
def test_the_constant_span_is_the_first_word_or_none(answered: bool, tmp_path: Path) -> None:
    """A third of the answers is the first word; where a quarter of the rows has no answer, the first word is better."""

    def ask(index: int) -> Row:
        context = words(index)
        word = context.split()[0] if index % 3 == 0 else "town"
        answer = {"text": [word], "answer_start": [context.index(word)]}
        empty = not answered and index % 4 == 1
        return {
            "question": "rain",
            "context": context,
            "answers": {"text": [], "answer_start": []} if empty else answer,
        }

    looked_at = preflight(tmp_path, *splits(tmp_path, ask), "task.type=question_answering")
    assert best_constant(looked_at) == pytest.approx(1 / 3 if answered else 1 / 4, abs=1e-6)


# The order of labels


def permuted_teacher(folder: Path, make: Callable[[int], Row], order: list[int]) -> Finding:
    """The finding on a teacher that is always right, but calls the data's class c the class order[c]."""
    saved = save_teacher(folder / "teacher", num_labels=3)
    looked_at = preflight(folder, *splits(folder, make), f"teacher.model={saved}", "teacher.training=null")
    looked_at.logits = one_hot([order[label] for label in looked_at.held_out["labels"][:]], 3)
    return only(teacher.check_label_order(looked_at))


def test_labels_in_another_order_are_an_error_and_the_right_order_is_told(tmp_path: Path) -> None:
    finding = permuted_teacher(tmp_path, three_names, [1, 2, 0])
    assert finding.level is Level.ERROR
    assert "the teacher's class 0 (LABEL_0) looks like the data's class 2 (good)" in finding.message
    assert "data.labels=[good, bad, fair]" in finding.remedy
    # What the remedy says is right: with it the same teacher agrees.
    told = preflight(
        tmp_path,
        *splits(tmp_path, three_names),
        "data.labels=[good, bad, fair]",
        f"teacher.model={tmp_path / 'teacher'}",
        "teacher.training=null",
    )
    own = {"bad": 1, "fair": 2, "good": 0}
    told.logits = one_hot([own[told.run.data.names[label]] for label in told.held_out["labels"][:]], 3)
    assert only(teacher.check_label_order(told)).level is Level.OK


def test_numbered_labels_in_another_order_are_to_be_renumbered(tmp_path: Path) -> None:
    finding = permuted_teacher(tmp_path, lambda index: {"text": words(index), "label": index % 3}, [1, 0, 2])
    assert finding.level is Level.ERROR
    assert "Renumber" in finding.remedy
    assert "1 -> 0, 0 -> 1" in finding.remedy


def test_labels_in_the_same_order_are_fine(tmp_path: Path) -> None:
    finding = permuted_teacher(tmp_path, three_names, [0, 1, 2])
    assert finding.level is Level.OK
    assert "agree on 100% of 60" in finding.message


def test_a_teacher_that_guesses_is_not_taken_for_a_permuted_one(tmp_path: Path) -> None:
    looked_at = preflight(tmp_path, *splits(tmp_path, two_classes), ready=True)
    guesses = [np.random.default_rng(seed).integers(2, size=ROWS).tolist() for seed in range(50)]
    for answers in (*guesses, [0] * ROWS, [1] * ROWS):
        looked_at.logits = one_hot(answers)
        assert only(teacher.check_label_order(looked_at)).level is Level.OK


def test_a_weak_sign_of_another_order_is_a_warning(tmp_path: Path) -> None:
    """39 of 60 answers are the next class, the others right."""
    saved = save_teacher(tmp_path / "teacher", num_labels=3)
    data = splits(tmp_path, three_names)
    looked_at = preflight(tmp_path, *data, f"teacher.model={saved}", "teacher.training=null")
    labels = looked_at.held_out["labels"][:]
    looked_at.logits = one_hot([(label + (index // 3 % 3 > 0)) % 3 for index, label in enumerate(labels)], 3)
    finding = only(teacher.check_label_order(looked_at))
    assert finding.level is Level.WARNING
    assert "agree on 35% of 60 validation labels, on 65% under other numbers" in finding.message
    assert "data.labels" in finding.remedy


def test_tags_in_another_order_show_behind_all_the_o(tmp_path: Path) -> None:
    names, kind = ("B-X", "B-Y", "O"), TASKS["token_classification"].logits
    looked_at = preflight(tmp_path, *splits(tmp_path, tagged), "task.type=token_classification")
    swapped = [one_hot([{0: 1, 1: 0}.get(tag, 2) for tag in row], 3) for row in looked_at.held_out["labels"][:]]
    table, compared = teacher.agreement_table([np.stack(row) for row in swapped], looked_at.held_out, kind, names)
    assert compared == 2 * ROWS
    assert table.tolist() == [[0, 0.5, 0], [0.5, 0, 0], [0, 0, 0]]


def test_yes_or_no_labels_in_another_order_show(tmp_path: Path) -> None:
    looked_at = preflight(tmp_path, *splits(tmp_path, several), "task.type=multi_label_classification")
    true = np.array(looked_at.held_out["labels"][:])
    logits = list(np.where(true[:, [0, 2, 1]] > 0, 1.0, -1.0))
    table, _ = teacher.agreement_table(logits, looked_at.held_out, looked_at.run.task.logits, ("a", "b", "c"))
    assert table[0, 0] == table[1, 2] == table[2, 1] == pytest.approx(1 / 3)
    assert np.trace(table) < 0.9
