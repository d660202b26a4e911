"""Claims about answering without transformers: the same pieces, logits and labels, whatever stands beside a row."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.serving.answers import FORWARD_PIECES, Answerer, Row, by_length
from distill.tasks import TASKS
from tests.builders import ROOT
from tests.served_models import NAMES, TEXTS, answerer_of, artefact_of, logits_of, predictions_of, rows_of

SENTENCES = [
    ("single_label_classification", False),
    ("single_label_classification", True),
    ("multi_label_classification", False),
    ("regression", True),
]


@pytest.mark.parametrize(("task", "pairs"), SENTENCES)
def test_logits_of_sentences_are_those_of_transformers(task: str, pairs: bool) -> None:
    rows = rows_of(task, pairs)
    answers = answerer_of(task).answer(rows)
    expected, _ = logits_of(task, rows)
    np.testing.assert_allclose([answer["logits"] for answer in answers], expected, atol=1e-4)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_answers_are_what_an_evaluation_takes_as_predictions(task: str) -> None:
    rows = rows_of(task)
    answers = answerer_of(task).answer(rows)
    expected = predictions_of(task, rows)
    if task == "regression":
        np.testing.assert_allclose([answer["logits"][0] for answer in answers], expected, atol=1e-4)
        return
    if task == "single_label_classification":
        expected = [NAMES[index] for index in expected]
    elif task == "multi_label_classification":
        expected = [[name for name, chosen in zip(NAMES, row, strict=True) if chosen] for row in expected]
    assert [answer["label"] for answer in answers] == expected
    assert len({str(answer["label"]) for answer in answers}) > 2, "rows that all get one answer would prove little"


def test_the_place_of_an_answer_in_its_context_holds_its_text() -> None:
    rows = rows_of("question_answering")
    for (_, context), answer in zip(rows, answerer_of("question_answering").answer(rows), strict=True):
        assert (context or "")[answer["start"] : answer["end"]] == answer["label"]
        assert 0 <= answer["score"] <= 1


def test_probabilities_of_classes_sum_to_one_and_those_of_labels_are_each_a_sigmoid() -> None:
    rows = rows_of("single_label_classification")
    for answer in answerer_of("single_label_classification").answer(rows):
        assert answer["probabilities"].sum() == pytest.approx(1, abs=1e-6)
    for answer in answerer_of("multi_label_classification").answer(rows):
        np.testing.assert_allclose(answer["probabilities"], 1 / (1 + np.exp(-answer["logits"])), rtol=1e-5)


def test_company_does_not_change_an_answer() -> None:
    answerer = answerer_of("single_label_classification")
    rows = rows_of("single_label_classification")
    alone = [answerer.answer([row])[0]["logits"] for row in rows]
    together = [answer["logits"] for answer in answerer.answer(rows * 5)]
    np.testing.assert_allclose(together, alone * 5, atol=1e-5)


def test_words_past_the_longest_row_are_tagged_outside() -> None:
    row: Row = (" ".join(["rain"] * 40), None)
    (answer,) = answerer_of("token_classification").answer([row])
    assert answer["label"][22:] == ["O"] * 18  # 24 pieces, two of them the ends
    assert len(answer["label"]) == 40


def padded_cost(lengths: list[int], groups: list[list[int]]) -> int:
    return sum(len(group) * max(lengths[row] for row in group) + FORWARD_PIECES for group in groups)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=7))
def test_rows_are_grouped_at_the_least_cost(lengths: list[int]) -> None:
    """Against every way to cut the rows in order of length."""
    groups = by_length(lengths)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    ways = [
        [order[begin:end] for begin, end in zip((0, *cuts), (*cuts, len(order)), strict=True)]
        for count in range(len(order))
        for cuts in combinations(range(1, len(order)), count)
    ]
    assert padded_cost(lengths, groups) == min(padded_cost(lengths, way) for way in ways)


def test_answering_loads_neither_torch_nor_transformers() -> None:
    """What an image or a SageMaker container is spared."""
    code = (
        "import sys; from pathlib import Path; from distill.serving.answers import Answerer\n"
        "import distill.serving.__main__\n"
        "print(Answerer.of_artefact(Path(sys.argv[1]), 1).answer([('rain', None)])[0]['label'])\n"
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    folder = artefact_of("single_label_classification")
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    label, loaded = done.stdout.splitlines()
    assert label == Answerer.of_artefact(folder, 1).answer([(TEXTS[0], None)])[0]["label"]
    assert loaded == "[]"
