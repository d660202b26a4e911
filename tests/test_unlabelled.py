"""Claims about task.unlabelled: its rows are read as the task's, train a student exactly as the same rows with labels
would, never hold what is reported, and are refused before any work where they cannot be read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Value
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from distill.settings import UserError
from distill.tasks import TASKS
from distill.teachers import open_checkpoint
from distill.tiny import load
from distill.unlabelled import UnlabelledOptions, load_unlabelled
from pipelines.unlabelled import says
from tests.builders import FEW_STEPS, TINY, finished_run, rows_of_phases, run_cli, succeed, write_rows

NAMES = ("O", "PER")
LIKE: Mapping[str, dict[str, list[Any]]] = {
    "single_label_classification": {"text": ["a"], "label": [1]},
    "multi_label_classification": {"text": ["a"], "label": [[0.0, 1.0]]},
    "regression": {"text": ["a"], "text_pair": ["b"], "label": [0.5]},
    "token_classification": {"tokens": [["a"]], "tags": [[1]]},
    "question_answering": {
        "question": ["a"],
        "context": ["b"],
        "answers": [{"text": ["b"], "answer_start": [0]}],
    },
}
NO_LABEL: Mapping[str, Any] = {
    "single_label_classification": 0,
    "multi_label_classification": [0.0, 0.0],
    "regression": 0.0,
    "token_classification": [0, 0, 0],
    "question_answering": {"text": [], "answer_start": []},
}


def tokenizer() -> PreTrainedTokenizerBase:
    return open_checkpoint("tiny-random").tokenizer


def loaded(task: str, file: str, **options: Any) -> Dataset:
    like = Dataset.from_dict(LIKE[task])
    given = UnlabelledOptions(path="json", data_files=file, **options)
    return load_unlabelled(given, TASKS[task], NAMES, like, tokenizer(), 0)


@pytest.mark.parametrize("task", list(LIKE))
def test_rows_have_the_training_splits_columns_and_types_and_no_label(task: str, tmp_path: Path) -> None:
    texts = {"first": "rain or snow", "second": "wind"}
    rows = loaded(task, write_rows(tmp_path / "rows.jsonl", [texts]), text="first", text_pair="second")
    like = Dataset.from_dict(LIKE[task])
    assert rows.features == like.features
    label = next(name for name in ("label", "tags", "answers") if name in like.column_names)
    assert rows[0][label] == NO_LABEL[task]
    first = next(name for name in ("text", "tokens", "question") if name in like.column_names)
    assert rows[0][first] == (["rain", "or", "snow"] if first == "tokens" else "rain or snow")
    if len(like.column_names) == 3:
        assert rows[0]["text_pair" if "text_pair" in rows.column_names else "context"] == "wind"


def test_words_may_be_a_list_or_are_cut_as_the_tokenizer_cuts_them(tmp_path: Path) -> None:
    lists = write_rows(tmp_path / "lists.jsonl", [{"tokens": ["don't", "go", "@town"]}])
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": "Don't go,  @Town!"}])
    assert loaded("token_classification", lists)["tokens"] == [["don't", "go", "@town"]]
    assert loaded("token_classification", texts)["tokens"] == [["Don", "'", "t", "go", ",", "@", "Town", "!"]]


def test_rows_that_lack_a_text_are_left_out(tmp_path: Path) -> None:
    given: Sequence[tuple[Any, Any]] = [("rain", "snow"), ("", "snow"), ("rain", None), ("  ", " "), ("wind", "frost")]
    file = write_rows(tmp_path / "rows.jsonl", [{"text": first, "text_pair": second} for first, second in given])
    rows = loaded("regression", file)
    assert list(zip(rows["text"], rows["text_pair"], strict=True)) == [("rain", "snow"), ("wind", "frost")]


def test_a_sample_is_of_the_rows_and_the_same_each_time(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"text": f"rain {number}"} for number in range(50)])
    samples = [loaded("single_label_classification", file, max_rows=7)["text"][:] for _ in range(2)]
    assert samples[0] == samples[1]
    assert len(set(samples[0])) == 7
    assert samples[0] != [f"rain {number}" for number in range(7)]


def test_a_row_is_counted_in_the_file_where_it_is_wrong_even_if_a_sample_is_taken(tmp_path: Path) -> None:
    rows = [{"text": [f"rain {number}"] if number == 18 else [], "label": 0} for number in range(20)]
    file = write_rows(tmp_path / "rows.jsonl", [row if row["text"] else {**row, "text": None} for row in rows])
    with pytest.raises(UserError, match="row 18 of"):
        loaded("single_label_classification", file, max_rows=3)


@pytest.mark.parametrize("kind", ["uint8", "int64", "bool", "float32"])
@pytest.mark.parametrize("task", ["single_label_classification", "regression"])
def test_a_label_column_may_be_of_any_type(task: str, kind: str, tmp_path: Path) -> None:
    like = Dataset.from_dict({**LIKE[task], "label": [1]}).cast_column("label", Value(kind))
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "rain", "text_pair": "snow"}])
    given = UnlabelledOptions(path="json", data_files=file)
    rows = load_unlabelled(given, TASKS[task], NAMES, like, tokenizer(), 0)
    assert rows.features == like.features


def test_a_split_may_be_named_and_a_text_file_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("rain\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("snow\n", encoding="utf-8")
    files: dict[str, str | list[str]] = {"train": str(tmp_path / "a.txt"), "test": str(tmp_path / "b.txt")}
    like = Dataset.from_dict(LIKE["single_label_classification"])
    for split, text in (("train", "rain"), ("test", "snow")):
        given = UnlabelledOptions(data_files=files, split=split)
        rows = load_unlabelled(given, TASKS["single_label_classification"], NAMES, like, tokenizer(), 0)
        assert rows["text"] == [text]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"body": "rain"}], ("task.unlabelled.text", "'text'", "body")),
        ([{"text": 3}], ("task.unlabelled.text", "row 0", "3 is not a text")),
        ([{"text": [1, 2]}], ("task.unlabelled.text", "row 0", "[1, 2]", "not a text")),
        ([{"text": " "}], ("task.unlabelled", "no text")),
    ],
)
def test_what_cannot_be_read_is_told(rows: list[dict[str, Any]], told: tuple[str, ...], tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError) as caught:
        loaded("single_label_classification", file)
    assert all(part in str(caught.value) for part in told), str(caught.value)


ALONE = ("general=null", "evaluate.undistilled=false", "runtime.precision=fp32")
TEACHER = "teacher={model: MODEL, training: null}"


def own_teacher() -> str:
    return TEACHER.replace("MODEL", str(finished_run() / "teacher" / "model"))


def rows_of(split: str) -> list[dict[str, Any]]:
    names = load()[split].features["label"].names
    return [{"text": row["text"], "label": names[row["label"]]} for row in load()[split]]


def data_of(folder: Path, train: Sequence[Mapping[str, Any]]) -> list[str]:
    folder.mkdir()
    splits = {"train": train, "validation": rows_of("validation"), "test": rows_of("test")}
    files = {split: write_rows(folder / f"{split}.jsonl", rows) for split, rows in splits.items()}
    return [
        "data.path=json",
        "data.labels=[weather, music]",
        *(f"data.data_files.{split}={file}" for split, file in files.items()),
    ]


@pytest.mark.parametrize("vocabulary", [(), ("student.vocabulary={size: 88}",)])
@pytest.mark.parametrize("phases", [(), ("task.intermediate=null", "task.joint=true")])
def test_they_train_as_the_same_rows_with_labels_do(
    vocabulary: tuple[str, ...], phases: tuple[str, ...], tmp_path: Path
) -> None:
    train = rows_of("train")
    labelled, more = train[:120], train[120:]
    wrong = [{**row, "label": "music"} for row in more]
    file = write_rows(tmp_path / "more.jsonl", [{"body": row["text"]} for row in more])
    runs = {
        "with labels": data_of(tmp_path / "all", labelled + wrong),
        "without": [
            *data_of(tmp_path / "part", labelled),
            f"task.unlabelled={{path: json, data_files: {file}, text: body}}",
        ],
    }
    weights = {}
    for name, data in runs.items():
        settings = (*FEW_STEPS, *ALONE, own_teacher(), "augment=null", *vocabulary, *phases, *data)
        succeed(TINY, *settings, "--stages", "task", "--output", tmp_path / name)
        weights[name] = load_file(tmp_path / name / "task" / "student" / "model.safetensors")
    assert weights["with labels"].keys() == weights["without"].keys()
    for name, value in weights["with labels"].items():
        assert torch.equal(value, weights["without"][name]), name
    result = json.loads((tmp_path / "without" / "task" / "result.json").read_text())
    assert (result["training_rows"], result["unlabelled_rows"]) == (192, 72)


def test_what_validation_and_test_rows_say_is_left_out(tmp_path: Path) -> None:
    held_out = [row["text"] for split in ("validation", "test") for row in rows_of(split)]
    texts = [*(text.upper().replace(" ", "  ") for text in held_out), "people often talk about a new song"]
    file = write_rows(tmp_path / "more.jsonl", [{"text": text} for text in texts])
    settings = (
        *FEW_STEPS,
        *ALONE,
        own_teacher(),
        "augment=null",
        f"task.unlabelled={{path: json, data_files: {file}}}",
    )
    outcome = succeed(TINY, *settings, "--output", tmp_path / "run", "--dry-run")
    assert "48 test, 1 unlabelled" in outcome.out

    write_rows(tmp_path / "more.jsonl", [{"text": text} for text in held_out])
    outcome = run_cli(TINY, *settings, "--output", tmp_path / "run")
    assert outcome.status == 2
    assert "task.unlabelled: each of its rows" in outcome.err
    assert not (tmp_path / "run").exists()


def test_held_out_words_are_known_however_they_are_cut() -> None:
    rows = Dataset.from_dict({"tokens": [["@paul", "does", "n't", "live", "in", "U.S.", "."]]})
    cut = {"tokens": ["@", "Paul", "doesn", "'", "t", "live", "in", "U", ".", "S", ".", "."]}
    other = {"tokens": ["@", "Paul", "does", "live", "in", "U", ".", "S", ".", "."]}
    assert says(rows[0], ["tokens"]) == says(cut, ["tokens"]) != says(other, ["tokens"])


@pytest.mark.parametrize("key", ["data", "general.corpus", "task.unlabelled"])
def test_files_beside_an_embedded_set_are_refused(key: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "more.jsonl", [{"text": "rain"}])
    outcome = run_cli(TINY, *FEW_STEPS, f"{key}={{path: tiny, data_files: {file}}}", "--output", tmp_path / "run")
    assert outcome.status == 2
    assert f"{key}.path: the embedded set tiny reads no file" in outcome.err


def test_the_student_on_labels_takes_as_many_steps(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "more.jsonl", [{"text": f"a new song {number}"} for number in range(40)])
    run = tmp_path / "run"
    succeed(
        *(TINY, "general=null", "augment=null", own_teacher(), "runtime.precision=fp32"),
        "task.intermediate={epochs: 2, batch_size: 16, log_every_steps: 1}",
        "task.logits={epochs: 1, batch_size: 16, log_every_steps: 1}",
        f"task.unlabelled={{path: json, data_files: {file}}}",
        *("--output", run),
    )
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = {row["stage"]: row["step"] for row in logged if "train/loss" in row}
    # 192 + 40 rows are 15 batches of 16.
    assert last == {"task.intermediate": 30, "task.logits": 15, "evaluate.undistilled": 45}


def test_they_stand_beside_augmented_rows_and_where_these_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of_phases(monkeypatch)
    file = write_rows(tmp_path / "more.jsonl", [{"text": f"a new song {number}"} for number in range(30)])
    settings = (*FEW_STEPS, *ALONE, own_teacher(), f"task.unlabelled={{path: json, data_files: {file}}}")
    run = tmp_path / "run"
    succeed(TINY, *settings, "augment.masked_lm=tiny-random", "task.augmented_logits=false", "--output", run)
    augmented = json.loads((run / "augment" / "result.json").read_text())["kept"]
    assert augmented
    assert rows == {"task.intermediate": 192 + augmented + 30, "task.logits": 192}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (("task.losses.labels={}",), "task.losses.labels=null"),
        (("task.intermediate=null", "task.augmented_logits=false"), "task.unlabelled: no phase trains on its rows"),
        (("task={intermediate: null, augmented_logits: false}",), "augment: no phase trains on its rows"),
        (("task.unlabelled.text=body",), "task.unlabelled.text"),
        (("task.unlabelled.data_files=nowhere.txt",), "nowhere.txt does not exist"),
        (("task.unlabelled.max_row=3",), "did you mean task.unlabelled.max_rows"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(settings: tuple[str, ...], told: str, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("rain and snow\n\nwind\n", encoding="utf-8")
    more = f"task.unlabelled={{path: text, data_files: {tmp_path / 'more.txt'}}}"
    outcome = run_cli(TINY, *FEW_STEPS, more, *settings, "--output", tmp_path / "run")
    assert outcome.status == 2
    assert told in outcome.err
    assert not (tmp_path / "run").exists()


def test_other_text_is_another_run(tmp_path: Path) -> None:
    file = tmp_path / "more.txt"
    file.write_text("people often talk about a new song\n", encoding="utf-8")
    settings = (
        TINY,
        *FEW_STEPS,
        *ALONE,
        own_teacher(),
        "augment=null",
        "--stages",
        "task",
        "--output",
        tmp_path / "run",
    )
    more = f"task.unlabelled={{path: text, data_files: {file}}}"
    succeed(*settings, more)
    succeed(*settings, more)
    file.write_text("people often talk about a new song\nwind near our town\n", encoding="utf-8")
    outcome = run_cli(*settings, more)
    assert outcome.status == 2
    assert "unlabelled content" in outcome.err
