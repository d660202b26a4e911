"""Claims about the preflight's checks of the rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.doctor import Level, rows
from tests.doctor_cases import (
    ROWS,
    Row,
    only,
    preflight,
    splits,
    three_names,
    two_classes,
    words,
)


def test_balanced_labels_are_fine_and_a_nearly_constant_one_is_noted(tmp_path: Path) -> None:
    finding = only(rows.check_labels(preflight(tmp_path, *splits(tmp_path, two_classes))))
    assert finding.level is Level.OK
    assert "yes, on 67% of 60" in finding.message

    def rarely(index: int) -> Row:
        return {"text": words(index), "label": "no" if index % 10 == 0 else "yes"}

    finding = only(rows.check_labels(preflight(tmp_path, *splits(tmp_path, rarely))))
    assert finding.level is Level.NOTE
    assert "90%" in finding.message
    assert "task.metric=matthews" in finding.remedy


def test_a_class_that_training_never_sees_is_named(tmp_path: Path) -> None:
    data = splits(tmp_path, three_names, train=two_of_three)
    findings = rows.check_labels(preflight(tmp_path, *data, "data.labels=[bad, fair, good, best]"))
    assert [finding.level for finding in findings] == [Level.OK, Level.WARNING]
    assert "no training row has good, best; validation or test rows have good" in findings[1].message
    assert "data.labels" in findings[1].remedy


def two_of_three(index: int) -> Row:
    return {"text": words(index), "label": ("bad", "fair")[index % 2]}


def test_numbers_that_are_all_the_same_are_warned_of(tmp_path: Path) -> None:
    for step, level in ((0.0, Level.WARNING), (0.5, Level.OK)):
        data = splits(tmp_path, lambda index, step=step: {"text": words(index), "label": index * step})  # type: ignore[misc]
        finding = only(rows.check_labels(preflight(tmp_path, *data, "task.type=regression")))
        assert finding.level is level
        assert bool(finding.remedy) is (level is not Level.OK)


def test_texts_in_two_splits_are_counted_without_case_and_spaces(tmp_path: Path) -> None:
    def copied(index: int) -> Row:
        """Five test rows say what training rows say."""
        inside = index - 2 * ROWS
        return {**two_classes(index), "text": f" {words(inside).upper()} " if inside < 5 else words(index)}

    finding = only(rows.check_overlap(preflight(tmp_path, *splits(tmp_path, two_classes, test=copied))))
    assert finding.level is Level.WARNING
    assert "5 of 60 texts of test (8.3%) also stand in train" in finding.message
    assert finding.remedy == "Remove the copies from train."
    finding = only(rows.check_overlap(preflight(tmp_path, *splits(tmp_path, two_classes))))
    assert finding.level is Level.OK


def test_cut_rows_are_counted_and_the_length_that_keeps_them_is_told(tmp_path: Path) -> None:
    """Half of the rows have 40 words, and two special pieces: 42, to the next multiple of 8."""

    def long(index: int) -> Row:
        return {**two_classes(index), "text": words(index, 40 if index % 2 else 6)}

    data = splits(tmp_path, long, test=two_classes)
    finding = only(rows.check_truncation(preflight(tmp_path, *data, "data.max_length=16")))
    assert finding.level is Level.WARNING
    assert "train 50.0%, validation 50.0%, test 0.0%" in finding.message
    assert "data.max_length=48 would keep 100%" in finding.remedy
    assert f"for {(42 + 8) / (16 + 8):.1f} times" in finding.remedy
    assert only(rows.check_truncation(preflight(tmp_path, *data, "data.max_length=48"))).level is Level.OK


def test_the_length_told_is_one_the_teacher_has_positions_for(tmp_path: Path) -> None:
    def long(index: int) -> Row:
        return {**two_classes(index), "text": words(index, 90 if index % 2 else 6)}

    data = splits(tmp_path, long)
    finding = only(rows.check_truncation(preflight(tmp_path, *data, "data.max_length=32")))
    assert "data.max_length=64, all that the teacher has positions for, would keep 50%" in finding.remedy
    finding = only(rows.check_truncation(preflight(tmp_path, *data, "data.max_length=64")))
    assert "shorten the texts" in finding.remedy


@pytest.mark.parametrize(("question", "level"), [("rain", Level.OK), ("rain " * 12, Level.WARNING)])
def test_long_contexts_are_windows_and_long_questions_are_cut(question: str, level: Level, tmp_path: Path) -> None:
    def ask(index: int) -> Row:
        context = words(index, 40)
        return {
            "question": question,
            "context": context,
            "answers": {"text": ["town"], "answer_start": [context.index("town")]},
        }

    looked_at = preflight(tmp_path, *splits(tmp_path, ask), "task.type=question_answering", "data.max_length=16")
    finding = only(rows.check_truncation(looked_at))
    assert finding.level is level
    assert "windows a context" in finding.message
    if level is Level.WARNING:
        assert "data.max_length=32" in finding.remedy


def test_words_the_tokenizer_does_not_know_are_shown(tmp_path: Path) -> None:
    """One unknown word among six."""

    def strange(index: int) -> Row:
        return {**two_classes(index), "text": words(index, 5) + " \u00f8re"}

    finding = only(rows.check_unknown_pieces(preflight(tmp_path, *splits(tmp_path, strange))))
    assert finding.level is Level.WARNING
    assert "16.67% of 360 training pieces are [UNK], for instance '\u00f8re'" in finding.message
    assert "language" in finding.remedy
    finding = only(rows.check_unknown_pieces(preflight(tmp_path, *splits(tmp_path, two_classes))))
    assert (finding.level, "0.00%" in finding.message) == (Level.OK, True)


def test_padding_is_counted_and_a_long_row_in_a_short_batch_is_noted(tmp_path: Path) -> None:
    """59 rows of 8 pieces and one of 62 in one batch, padded to 64."""

    def one_long(index: int) -> Row:
        return {**two_classes(index), "text": words(index, 60 if index == 0 else 6)}

    one_batch = ("data.max_length=64", f"task.intermediate.batch_size={ROWS}")
    finding = only(rows.check_padding(preflight(tmp_path, *splits(tmp_path, one_long), *one_batch)))
    assert finding.level is Level.NOTE
    assert finding.message.startswith(f"{1 - (59 * 8 + 62) / (60 * 64):.0%} of the pieces")
    assert "task.intermediate.batch_size" in finding.remedy
    finding = only(rows.check_padding(preflight(tmp_path, *splits(tmp_path, two_classes), *one_batch)))
    assert finding.level is Level.OK
    assert finding.message.startswith("0%")
