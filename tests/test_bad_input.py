"""Claims about what users get wrong: exit status 2 before any training, one message with key or row and remedy,
nothing written."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from distill import tiny
from tests.bad_input_cases import CSV, LINES, MORE_CASES, ROWS, file, rows
from tests.builders import TINY, contents, finished_run, run_cli, succeed, write_rows

GOOD = [{"text": f"rain wind walk {index}", "label": index % 2} for index in range(20)]
Overrides = list[str]


def _json(folder: Path, rows: list[dict[str, object]], *more: str) -> Overrides:
    return ["data.path=json", f"data.data_files.train={write_rows(folder / 'train.jsonl', rows)}", *more]


def _missing_column(folder: Path) -> Overrides:
    return _json(folder, GOOD, "data.text=sentence")


def _label_outside(folder: Path) -> Overrides:
    return _json(folder, [*GOOD, {"text": "snow", "label": 7}], "data.labels=[a, b]")


def _label_unnamed(folder: Path) -> Overrides:
    rows = [{"text": row["text"], "label": "ab"[int(str(row["label"]))]} for row in GOOD]
    return _json(folder, [*rows, {"text": "snow", "label": "c"}], "data.labels=[a, b]")


def _withheld_training_label(folder: Path) -> Overrides:
    return _json(folder, [*GOOD, {"text": "snow", "label": -1}])


def _one_label(folder: Path) -> Overrides:
    return _json(folder, [{"text": "rain", "label": "only"}] * 20)


def _empty_text(folder: Path) -> Overrides:
    return _json(folder, [*GOOD, {"text": "  ", "label": 1}])


def _number_as_text(folder: Path) -> Overrides:
    return _json(folder, [{"text": index, "label": index % 2} for index in range(20)])


def _regression_on_words(folder: Path) -> Overrides:
    rows = [{"text": "rain", "label": "high"}] * 20
    return _json(folder, rows, "task.type=regression")


def _ragged_tags(folder: Path) -> Overrides:
    rows = [{"tokens": ["rain", "wind"], "tags": ["O", "B-X"]}] * 20 + [{"tokens": ["rain"], "tags": ["O", "O"]}]
    return _json(folder, rows, "task.type=token_classification")


def _empty_split(folder: Path) -> Overrides:
    (folder / "test.jsonl").write_text("")
    return _json(folder, GOOD, f"data.data_files.test={folder / 'test.jsonl'}")


def _three_labels(folder: Path) -> Overrides:
    rows = [{"text": f"rain {index}", "label": index % 3} for index in range(30)]
    return _json(folder, rows, "task.metric=f1")


def _gpt_teacher(folder: Path) -> Overrides:
    config = GPT2Config(vocab_size=len(tiny.tokenizer()), n_embd=32, n_layer=4, n_head=4)
    GPT2ForSequenceClassification(config).save_pretrained(folder / "teacher")
    tiny.tokenizer().save_pretrained(folder / "teacher")
    return [f"teacher.model={folder / 'teacher'}", "augment=null"]


def _few_rows(folder: Path) -> Overrides:
    return _json(folder, GOOD[:4])


def _broken_json(folder: Path) -> Overrides:
    (folder / "train.jsonl").write_text('{"text": "rain", "label": 0}\n{"text": \n')
    return ["data.path=json", f"data.data_files.train={folder / 'train.jsonl'}"]


def _truncated_gzip(folder: Path) -> Overrides:
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in GOOD).encode())
    (folder / "train.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    return ["data.path=json", f"data.data_files.train={folder / 'train.jsonl.gz'}"]


def _absent_file(folder: Path) -> Overrides:
    return ["data.path=json", f"data.data_files.train={folder / 'no.jsonl'}"]


def _unknown_split(folder: Path) -> Overrides:
    return ["data.path=json", f"data.data_files.tset={write_rows(folder / 'rows.jsonl', list(GOOD))}"]


def _teacher(folder: Path, *, labels: int, vocabulary: int | None = None, tokenizer: bool = True) -> Overrides:
    pieces = tiny.tokenizer()
    config = BertConfig(
        vocab_size=vocabulary or len(pieces),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=labels,
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder / "teacher")
    if tokenizer:
        pieces.save_pretrained(folder / "teacher")
    return [f"teacher.model={folder / 'teacher'}", "teacher.training=null"]


def _teacher_with_other_labels(folder: Path) -> Overrides:
    return _teacher(folder, labels=5)


def _teacher_with_small_vocabulary(folder: Path) -> Overrides:
    return _teacher(folder, labels=2, vocabulary=20)


def _teacher_without_tokenizer(folder: Path) -> Overrides:
    return _teacher(folder, labels=2, tokenizer=False)


def _teacher_folder_empty(folder: Path) -> Overrides:
    (folder / "teacher").mkdir()
    return [f"teacher.model={folder / 'teacher'}"]


def _vectors_absent(folder: Path) -> Overrides:
    return ["augment.masked_lm=null", f"augment.vectors={folder / 'vectors.txt'}"]


def _names_of_numbers(folder: Path) -> Overrides:
    rows = [{"text": f"rain {index}", "label": index / 20} for index in range(20)]
    return _json(folder, rows, "task.type=regression", "data.labels=[low, high]")


def _same_split_twice(folder: Path) -> Overrides:
    return _json(folder, GOOD, "data.splits={validation: train}")


def _corpus(folder: Path, *more: str) -> Overrides:
    file = write_rows(folder / "corpus.jsonl", [{"body": "rain and wind"}] * 20)
    return ["general.corpus.path=json", f"general.corpus.data_files={file}", *more]


def _corpus_column(folder: Path) -> Overrides:
    return _corpus(folder)


def _corpus_stream_column(folder: Path) -> Overrides:
    return _corpus(folder, "general.streaming=true", "general.corpus.text=text")


def _corpus_blank(folder: Path) -> Overrides:
    file = write_rows(folder / "corpus.jsonl", [{"text": " "}] * 20)
    return ["general.corpus.path=json", f"general.corpus.data_files={file}"]


def _corpus_absent(folder: Path) -> Overrides:
    return ["general.corpus.path=text", f"general.corpus.data_files={folder / 'no.txt'}"]


def _corpus_split(folder: Path) -> Overrides:
    file = write_rows(folder / "corpus.jsonl", [{"text": "rain"}] * 20)
    return ["general.corpus.path=json", f"general.corpus.data_files.test={file}"]


CASES: dict[str, tuple[Overrides | Callable[[Path], Overrides], tuple[str, ...]]] = {
    "missing column": (_missing_column, ("data.text", "'sentence'", "label")),
    "label number outside the names": (_label_outside, ("data.label", "row 20 of train", "7")),
    "label name outside the names": (_label_unnamed, ("data.label", "row 20 of train", "'c'", "a, b")),
    "withheld label in training": (_withheld_training_label, ("data.label", "row 20 of train", "-1")),
    "one label only": (_one_label, ("data.label", "two or more")),
    "empty text": (_empty_text, ("data.text", "row 20 of train", "empty")),
    "number as text": (_number_as_text, ("data.text", "row 0 of train", "not a text")),
    "words as numbers": (_regression_on_words, ("data.label", "row 0 of train", "not a number")),
    "ragged tags": (_ragged_tags, ("data.label", "row 20 of train", "1 tokens and 2 tags")),
    "too few rows": (_few_rows, ("data.validation_split", "4 rows")),
    "empty split": (_empty_split, ("data.data_files", "test")),
    "names of numbers": (_names_of_numbers, ("data.labels", "regression")),
    "one split twice": (_same_split_twice, ("data.splits", "'train'", "validation")),
    "length past the positions": (["data.max_length=65"], ("data.max_length", "65", "64")),
    "corpus length past the positions": (["general.max_length=128"], ("general.max_length", "128", "64")),
    "corpus column": (_corpus_column, ("general.corpus.text", "'text'", "body")),
    "streamed corpus column": (_corpus_stream_column, ("general.corpus.text", "'text'", "body")),
    "corpus of blanks": (_corpus_blank, ("general.corpus", "no text")),
    "corpus absent": (_corpus_absent, ("general.corpus.data_files", "no.txt")),
    "corpus without train": (_corpus_split, ("general.corpus.data_files", "no train split")),
    "streamed toy": (["general.streaming=true"], ("general.streaming", "tiny")),
    "no general loss": (
        ["general.losses={embedding: null, attention: null, hidden: null}"],
        ("general.losses", "at least one"),
    ),
    "no prediction loss": (["task.losses.logits=null"], ("task.losses", "task.logits=null")),
    "metric of two classes": (_three_labels, ("task.metric", "'f1'", "f1_macro")),
    "unknown family": (_gpt_teacher, ("teacher.model", "gpt2")),
    "broken json": (_broken_json, ("data.path", "cannot be read")),
    "truncated gzip": (_truncated_gzip, ("data.path", "cannot be read")),
    "absent file": (_absent_file, ("data.data_files", "no.jsonl", "does not exist")),
    "unknown split": (_unknown_split, ("data.data_files", "'tset'", "train")),
    "set that is nowhere": (["data.path=no_such_set_here"], ("data.path", "no_such_set_here")),
    "teacher's labels": (_teacher_with_other_labels, ("teacher.model", "5 labels", "2 (weather, music)")),
    "teacher's vocabulary": (_teacher_with_small_vocabulary, ("teacher.model", "20 embeddings")),
    "teacher without tokenizer": (_teacher_without_tokenizer, ("teacher.model", "tokenizer")),
    "teacher folder empty": (_teacher_folder_empty, ("teacher.model", "config.json")),
    "teacher that is nowhere": (["teacher.model=nobody/no-such-bert"], ("teacher.model", "no-such-bert")),
    "fresh head": (["teacher.training=null"], ("teacher.model", "freshly initialised", "teacher.training")),
    "vectors absent": (_vectors_absent, ("augment.vectors", "vectors.txt")),
    "map past the teacher": (["layer_map.pairs=[[1, 9]]"], ("layer_map.pairs", "[1, 9]", "1 to 4")),
    "map past the student": (["layer_map.pairs=[[3, 1]]"], ("layer_map.pairs", "[3, 1]", "1 to 2")),
    "student deeper": (["student.layers=5"], ("student.layers", "4")),
    "width and heads": (["student.width=25"], ("student.width", "25", "multiple")),
    "other head count": (["student.heads=2"], ("student.heads", "4")),
    "identity between widths": (["student.projection=identity"], ("student.projection", "24", "32")),
    "student of another shape": (["student.initialization=tiny-random"], ("student.initialization",)),
    "student of no such family": (["student.family=gpt2"], ("student.family", "'gpt2'", "distilbert")),
    "student of a bottleneck": (["student.family=mobilebert"], ("student.family", "bottleneck")),
    "student that cannot be cut": (
        ["student.family=distilbert"],
        ("student.initialization", "distilbert", "student.initialization=random"),
    ),
    "layers of another width": (["student.initialization=layers"], ("student.initialization", "student.width=32")),
    "misspelt key": (["task.intermediat.epochs=1"], ("task.intermediat", "task.intermediate?")),
    "misspelt loss": (["task.losses.atention.weight=1"], ("task.losses.atention", "task.losses.attention?")),
    "negative rate": (["task.logits.learning_rate=-1"], ("task.logits.learning_rate", "greater than 0")),
    "word for a number": (["student.layers=many"], ("student.layers", "'many'")),
    "unknown task": (["task.type=translation"], ("task.type", "'translation'")),
    "unknown metric": (["task.metric=bleu"], ("task.metric", "'bleu'", "accuracy")),
    "no override": (["seed"], ("'seed'", "section.key=value")),
    "override through a value": (["data.path.more=1"], ("'data.path.more=1'", "data.path is a value")),
    "both phases off": (["task.intermediate=null", "task.logits=null"], ("task", "off")),
    "no intermediate loss": (
        ["task.losses.embedding=null", "task.losses.attention=null", "task.losses.hidden=null"],
        ("task.losses", "task.intermediate=null"),
    ),
    "stream without steps": (
        ["general.streaming=true", "general.training.max_steps=null", "general.corpus.path=text"],
        ("general.training.max_steps",),
    ),
    "nothing to do": (["task=null", "general=null"], ("nothing to do",)),
    "unknown tracker": (["tracking=[wnadb]"], ("tracking", "'wnadb'")),
    "unknown stage": (["--stages", "train"], ("--stages", "'train'", "teacher")),
    "later stage first": (["--stages", "task"], ("--stages", "no result yet")),
}


ALL = CASES | MORE_CASES


@pytest.mark.parametrize("case", ALL)
def test_a_mistake_ends_with_2_names_its_place_and_writes_nothing(case: str, tmp_path: Path) -> None:
    overrides, expected = ALL[case]
    output = tmp_path / "output"
    arguments = overrides(tmp_path) if callable(overrides) else overrides
    outcome = run_cli(TINY, "runtime.precision=fp32", *arguments, "--output", output)
    assert outcome.status == 2, outcome.err[-2000:]
    assert outcome.err.startswith("error: ")
    assert "Traceback" not in outcome.err
    for part in expected:
        assert part in outcome.err, outcome.err
    assert not output.exists()
    assert not (tmp_path / "run").exists(), "code from the input was run"


def _accepted(folder: Path, overrides: Overrides) -> str:
    return succeed(TINY, "runtime.precision=fp32", *overrides, "--output", folder / "output", "--dry-run").out


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(file("a.csv", b"\xef\xbb\xbf" + CSV), id="csv with a byte-order mark"),
        pytest.param(file("a.json", b"\xef\xbb\xbf" + LINES), id="json with a byte-order mark"),
        pytest.param(rows([*ROWS, {"text": "rain " * 200_000, "label": 1}]), id="a line of a megabyte"),
        pytest.param(rows([{**row, "label": float(row["label"])} for row in ROWS]), id="classes as whole floats"),
        pytest.param(rows([{**row, "label": ["no", "yes"][row["label"]]} for row in ROWS]), id="classes as words"),
        pytest.param(rows([{**row, "id": 7} for row in ROWS]), id="ids that are all the same"),
        pytest.param(rows([*ROWS, {"text": "rain\0wind \x1b[2J", "label": 1}]), id="control characters"),
    ],
)
def test_what_looks_wrong_but_is_not_is_taken(make: Callable[[Path], Overrides], tmp_path: Path) -> None:
    assert "train" in _accepted(tmp_path, make(tmp_path))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"seed: 1\nseed: 2\n", "'seed' stands twice"),
        (b"seed:\t1\n\tdata: 2\n", "not YAML"),
        ("output: r\xe9sum\xe9\n".encode("latin-1"), "cannot be read"),
        (b"seed: 1\0\n", "not YAML"),
        (b"- seed\n", "a config is a mapping"),
        (b"", "a config is a mapping"),
        (b"1: 2\n", "keys should be strings"),
        (b"seed: !!python/object/apply:os.getpid []\n", "not YAML"),
    ],
)
def test_a_config_file_that_is_wrong_is_named(content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_bytes(content)
    outcome = run_cli(tmp_path / "wrong.yaml")
    assert outcome.status == 2
    assert outcome.err.startswith("error: ")
    assert expected in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.yaml"]


def test_a_config_that_is_not_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("seed: 1\ndata: {path: [\n")
    outcome = run_cli(tmp_path / "broken.yaml")
    assert outcome.status == 2
    assert "broken.yaml, line" in outcome.err


def test_a_config_that_is_not_there_is_named(tmp_path: Path) -> None:
    outcome = run_cli(tmp_path / "no.yaml")
    assert outcome.status == 2
    assert "no.yaml" in outcome.err


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    outcome = run_cli(TINY, "runtime.precision=fp32", "--output", tmp_path)
    assert outcome.status == 2
    assert "--output" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_output_that_is_a_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("years of work")
    outcome = run_cli(TINY, "runtime.precision=fp32", "--output", tmp_path / "run")
    assert outcome.status == 2
    assert "is a file" in outcome.err
    assert "--output" in outcome.err
    assert (tmp_path / "run").read_text() == "years of work"


def test_a_changed_setting_is_refused_with_its_name_and_nothing_is_overwritten() -> None:
    folder = finished_run()

    def own() -> dict[str, tuple[int, int]]:
        # W&B's own service may still write its log.
        return {name: seen for name, seen in contents(folder).items() if not name.startswith("wandb/")}

    before = own()
    outcome = run_cli(folder / "config.yaml", "student.width=16", "--output", folder)
    assert outcome.status == 2
    assert "student.width: 24 -> 16" in outcome.err
    assert "--redo" in outcome.err
    assert own() == before
