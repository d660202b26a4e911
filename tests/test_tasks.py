"""Claims about distill/tasks/ and rows.py: all five task types read a user's rows, encode, pad and decode them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from distill import tiny
from distill.data import Collator, tokenize
from distill.evaluation import score
from distill.rows import canonical_rows
from distill.settings import UserError
from distill.tasks import TASKS, Columns

TOKENIZER = tiny.tokenizer()
IGNORED = -100


def number_of(piece: str) -> int:
    return TOKENIZER.convert_tokens_to_ids(piece)


@dataclass
class Case:
    """A user's rows in his own columns, and what must come of them."""

    task: str
    columns: Columns
    rows: list[dict[str, Any]]
    names: tuple[str, ...]
    batch_labels: Any
    """The padded labels of the rows as one batch, written out by hand."""


CONTEXT = "people often walk near our town before every long walk"
CASES = [
    Case(
        "single_label_classification",
        Columns(text="body", label="kind"),
        [{"body": "rain and snow", "kind": "wet"}, {"body": "song", "kind": "loud"}, {"body": "wind", "kind": "wet"}],
        ("loud", "wet"),
        [1, 0, 1],
    ),
    Case(
        "multi_label_classification",
        Columns(label="topics"),
        [{"text": "rain song", "topics": ["b", "a"]}, {"text": "walk", "topics": []}, {"text": "x", "topics": ["c"]}],
        ("a", "b", "c"),
        [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]],
    ),
    Case(
        "regression",
        Columns(text="one", text_pair="two", label="likeness"),
        [{"one": "rain", "two": "snow", "likeness": 4.5}, {"one": "rain", "two": "song", "likeness": 0}],
        (),
        [4.5, 0.0],
    ),
    Case(
        "token_classification",
        Columns(text="words", label="marks"),
        # "xy" is two pieces, and only the first one carries the tag.
        [
            {"words": ["rain", "xy", "town"], "marks": ["O", "B-X", "I-X"]},
            {"words": ["xyz"], "marks": ["B-X"]},
        ],
        ("B-X", "I-X", "O"),
        [
            [IGNORED, 2, 0, IGNORED, 1, IGNORED, IGNORED, IGNORED],
            [IGNORED, 0, IGNORED, IGNORED, IGNORED, IGNORED, IGNORED, IGNORED],
        ],
    ),
    Case(
        "question_answering",
        Columns(),
        [
            {
                "id": "1",
                "question": "walk near",
                "context": CONTEXT,
                "answers": {"text": ["our town"], "answer_start": [23]},
            },
            {"id": "2", "question": "long", "context": "long walk", "answers": {"text": ["walk"], "answer_start": [5]}},
        ],
        (),
        # [CLS] walk near [SEP] people often walk near our town: pieces 8 and 9; [CLS] long [SEP] long walk: piece 4.
        [[8, 9], [4, 4]],
    ),
]
BY_NAME = {case.task: case for case in CASES}


def read(case: Case) -> tuple[Any, Dataset, list[str]]:
    task, source = TASKS[case.task], Dataset.from_list(case.rows)
    label = task.columns(case.columns, source.column_names)
    own = label.get("tags") or label.get("answers") or label["label"]
    names = task.label_names(source[own][:], source.features[own])
    return task, canonical_rows(source, task, case.columns, names, "train"), names


def perfect_logits(task: Any, labels: Any, lengths: Sequence[int], names: Sequence[str]) -> list[np.ndarray]:
    """Logits that say what the padded labels of a batch say; for windows without the answer: no answer."""
    logits = []
    for label, length in zip(labels, lengths, strict=True):
        if task.name == "single_label_classification":
            logits.append(np.eye(len(names))[label])
        elif task.name == "multi_label_classification":
            logits.append(np.asarray(label) - 0.5)
        elif task.name == "regression":
            logits.append(np.asarray([label]))
        elif task.name == "token_classification":
            rows = np.zeros((length, len(names)))
            for at, tag in enumerate(label[:length]):
                rows[at, tag if tag != IGNORED else 0] = 1
            logits.append(rows)
        else:
            rows = np.full((length, 2), -9.0)
            rows[label[0], 0] = rows[label[1], 1] = 9 if label[0] else 4
            logits.append(rows)
    return logits


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.task)
def test_rows_become_the_labels_written_out_by_hand(case: Case) -> None:
    task, rows, names = read(case)
    assert tuple(names) == case.names
    features = tokenize(rows, task, TOKENIZER, 32, "encode")
    assert features["row"][:] == list(range(len(case.rows)))
    batch = Collator(TOKENIZER, task)(features[:], [1.0] * len(features))
    assert batch["labels"].tolist() == case.batch_labels
    assert batch["labels"].dtype.is_floating_point == (case.task in ("regression", "multi_label_classification"))
    assert features["length"][:] == [len(ids) for ids in features["input_ids"]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.task)
def test_perfect_logits_have_perfect_figures(case: Case) -> None:
    task, rows, names = read(case)
    features = tokenize(rows, task, TOKENIZER, 32, "encode")
    batch = Collator(TOKENIZER, task)(features[:], [1.0] * len(features))
    logits = perfect_logits(task, batch["labels"].numpy(), features["length"][:], names)
    figures = score(logits, features, rows, task, names)
    assert task.primary in figures
    assert figures.pop("mean_squared_error", 0) == 0
    # No single row of the multi-label case lacks every label of a name, so every f1 is defined.
    assert figures == pytest.approx(dict.fromkeys(figures, 1.0))


def test_a_pair_is_one_sequence_of_two_parts() -> None:
    task, rows, _ = read(BY_NAME["regression"])
    features = tokenize(rows, task, TOKENIZER, 32, "encode")
    pieces = ["[CLS]", "rain", "[SEP]", "snow", "[SEP]"]
    assert features["input_ids"][0] == [number_of(piece) for piece in pieces]
    assert features["token_type_ids"][0] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("task_name", ["single_label_classification", "token_classification"])
def test_long_rows_are_cut_to_max_length(task_name: str) -> None:
    rows = Dataset.from_dict(
        {"text": ["rain " * 50], "label": [1]}
        if task_name == "single_label_classification"
        else {"tokens": [["rain"] * 50], "tags": [[0] * 50]}
    )
    features = tokenize(rows, TASKS[task_name], TOKENIZER, 10, "encode")
    assert features["length"][:] == [10]
    assert features["input_ids"][0][-1] == number_of("[SEP]")


def test_words_beyond_max_length_count_as_outside() -> None:
    task, names = TASKS["token_classification"], ["O", "B-X"]
    rows = Dataset.from_dict({"tokens": [["rain", "snow", "song", "town"]], "tags": [[1, 0, 0, 1]]})
    features = tokenize(rows, task, TOKENIZER, 5, "encode")  # [CLS] rain snow song [SEP]
    logits = [np.eye(2)[[0, 1, 0, 0, 0]]]
    predicted, true = task.decode(logits, features, rows, names)
    assert predicted == [["B-X", "O", "O", "O"]]
    assert true == [["B-X", "O", "O", "B-X"]]


def test_a_word_without_pieces_shifts_no_tag() -> None:
    """Tweets have words of nothing but control characters, which the tokenizer drops."""
    task, names = TASKS["token_classification"], ["O", "B-X"]
    rows = Dataset.from_dict({"tokens": [["rain", "\u200b", "town"]], "tags": [[1, 0, 1]]})
    features = tokenize(rows, task, TOKENIZER, 16, "encode")
    assert features["length"][:] == [4]
    predicted, true = task.decode([np.eye(2)[[0, 1, 1, 0]]], features, rows, names)
    assert predicted == true == [["B-X", "O", "B-X"]]


# ---- questions


def long_question(answer: str, repeats: int = 20) -> dict[str, Any]:
    """A context of several windows, the answer near its end."""
    context = " ".join(["people often talk about rain"] * repeats) + " xylophone concert at " + "night " * 5
    start = context.index(answer)
    return {
        "id": "1",
        "question": "where was music",
        "context": context,
        "answers": {"text": [answer], "answer_start": [start]},
    }


def windows_of(row: dict[str, Any], max_length: int = 32) -> tuple[Any, Dataset, Dataset]:
    task = TASKS["question_answering"]
    rows = canonical_rows(Dataset.from_list([row]), task, Columns(), [], "train")
    return task, rows, tokenize(rows, task, TOKENIZER, max_length, "encode")


def test_windows_cover_the_context_and_overlap_by_a_quarter() -> None:
    row = long_question("xylophone concert")
    _, _, windows = windows_of(row)
    assert len(windows) > 3
    assert set(windows["row"]) == {0}
    covered: list[list[int]] = []
    for window in windows:
        covered.append([start for start in window["starts"] if start >= 0])
        for piece, start, end in zip(window["input_ids"], window["starts"], window["ends"], strict=True):
            if start >= 0:
                text = row["context"][start:end]
                assert TOKENIZER.convert_ids_to_tokens(piece).removeprefix("##") == text
    alone = TOKENIZER(row["context"], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert set().union(*covered) == {start for start, _ in alone}
    for before, after in itertools.pairwise(covered):
        assert before[-8:] == after[:8], "32 / 4 pieces stand in both"


def test_a_window_points_at_the_answer_only_where_all_of_it_lies_inside() -> None:
    row = long_question("xylophone concert")
    _, _, windows = windows_of(row)
    begin = row["answers"]["answer_start"][0]
    end = begin + len("xylophone concert")
    found = 0
    for window in windows:
        first, last = window["labels"]
        inside = begin in window["starts"] and end in window["ends"]
        assert (first, last) != (0, 0) if inside else (first, last) == (0, 0)
        if inside:
            found += 1
            assert row["context"][window["starts"][first] : window["ends"][last]] == "xylophone concert"
    assert 0 < found < len(windows)


@pytest.mark.parametrize("answer", ["xylophone concert", "people often", "night"])
def test_the_best_window_answers_for_the_row(answer: str) -> None:
    task, rows, windows = windows_of(long_question(answer))
    logits = perfect_logits(task, windows["labels"][:], windows["length"][:], [])
    predicted, references = task.decode(logits, windows, rows, [])
    assert predicted == [answer]
    assert references == [[answer]]


def test_no_answer_wins_only_in_a_set_that_has_such_rows() -> None:
    task = TASKS["question_answering"]
    answered = {
        "id": "1",
        "question": "long",
        "context": "long walk",
        "answers": {"text": ["walk"], "answer_start": [5]},
    }
    unanswered = {**answered, "id": "2", "answers": {"text": [], "answer_start": []}}
    says_nothing = np.array([[9.0, 9.0], [0, 0], [0, 0], [1, 0], [0, 1], [0, 0]])

    def decode(rows: list[dict[str, Any]]) -> tuple[list[Any], list[Any]]:
        checked = canonical_rows(Dataset.from_list(rows), task, Columns(), [], "train")
        features = tokenize(checked, task, TOKENIZER, 32, "encode")
        return task.decode([says_nothing] * len(rows), features, checked, [])

    assert decode([answered, unanswered]) == (["", ""], [["walk"], [""]])
    assert decode([answered])[0] == ["long walk"]


def test_a_question_longer_than_the_window_leaves_room_for_the_context() -> None:
    row = {**long_question("night"), "question": "why " + "rain " * 60}
    task, rows, windows = windows_of(row)
    assert max(windows["length"]) <= 32
    logits = perfect_logits(task, windows["labels"][:], windows["length"][:], [])
    assert task.decode(logits, windows, rows, [])[0] == ["night"]


# ---- wrong rows


@pytest.mark.parametrize(
    ("task", "rows", "columns", "message"),
    [
        (
            "single_label_classification",
            [{"text": "a", "label": "x"}, {"text": "b", "label": "z"}],
            Columns(),
            r"data\.label: row 1 of dev, column 'label': label 'z' is not one of \(x, y\)\. Correct or remove",
        ),
        (
            "single_label_classification",
            [{"text": "a", "label": 2}],
            Columns(),
            r"row 0 of dev.*label 2 is outside the 2 names \(x, y\)",
        ),
        (
            "single_label_classification",
            [{"text": "a", "label": 0}, {"text": " ", "label": 0}],
            Columns(),
            r"data\.text: row 1 of dev, column 'text': the text is empty",
        ),
        (
            "single_label_classification",
            [{"text": 5, "label": 0}],
            Columns(),
            r"data\.text: row 0 of dev, column 'text': 5 is not a text",
        ),
        (
            "single_label_classification",
            [{"text": "a", "other": None, "label": 0}],
            Columns(text_pair="other"),
            r"data\.text_pair: row 0 of dev, column 'other': None is not a text",
        ),
        (
            "single_label_classification",
            [{"sentence": "a", "label": 0}],
            Columns(),
            r"data\.text: there is no column 'text'; the data has sentence, label\. Set data\.text to one of them",
        ),
        (
            "multi_label_classification",
            [{"text": "a", "label": "x"}],
            Columns(),
            r"data\.label: row 0 of dev.*'x' is not a list of labels",
        ),
        (
            "multi_label_classification",
            [{"text": "a", "label": ["x", "z"]}],
            Columns(),
            r"label 'z' is not one of \(x, y\)",
        ),
        (
            "regression",
            [{"text": "a", "label": "much"}],
            Columns(),
            r"data\.label: row 0 of dev.*'much' is not a number",
        ),
        ("regression", [{"text": "a", "label": float("nan")}], Columns(), r"row 0 of dev.*is not a number"),
        (
            "token_classification",
            [{"tokens": ["a", "b"], "tags": ["x"]}],
            Columns(),
            r"data\.label: row 0 of dev has 2 tokens and 1 tags",
        ),
        (
            "token_classification",
            [{"tokens": [], "tags": []}],
            Columns(),
            r"data\.text: row 0 of dev.*not a list of words",
        ),
        ("token_classification", [{"tokens": "a", "tags": ["x"]}], Columns(), r"data\.text: row 0 of dev"),
        (
            "question_answering",
            [{"id": "1", "question": "a", "context": "b", "answers": "b"}],
            Columns(),
            r"data\.label: row 0 of dev, column 'answers': 'b' has no text and answer_start",
        ),
        (
            "question_answering",
            [{"id": "1", "question": "a", "context": "b", "answers": {"text": ["b"], "answer_start": [7]}}],
            Columns(),
            r"data\.label: row 0 of dev, column 'answers': 'b' does not stand at 7 of the context",
        ),
    ],
)
def test_a_wrong_row_is_named(task: str, rows: list[dict[str, Any]], columns: Columns, message: str) -> None:
    with pytest.raises(UserError, match=message):
        canonical_rows(Dataset.from_list(rows), TASKS[task], columns, ["x", "y"], "dev")
