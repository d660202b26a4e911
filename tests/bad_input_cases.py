"""More of what users get wrong: files in other encodings, cut off or of other shape; labels of another task; teachers
with damaged files; settings out of range. Each with parts of its message; test_bad_input.py runs them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow
import torch
from pyarrow import parquet
from transformers import BertConfig, BertForSequenceClassification

from distill import tiny
from tests.builders import write_rows

Overrides = list[str]
Make = Callable[[Path], Overrides]
Case = tuple[Overrides | Make, tuple[str, ...]]

ROWS = [{"text": f"rain wind walk {index}", "label": index % 2} for index in range(20)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = ("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS)).encode()
MULTI, TOKENS = "task.type=multi_label_classification", "task.type=token_classification"
QUESTIONS, REGRESSION = "task.type=question_answering", "task.type=regression"


def file(name: str, content: bytes, *more: str) -> Make:
    """A training file of these bytes, read by the builder that its name ends with."""

    def make(folder: Path) -> Overrides:
        (folder / name).write_bytes(content)
        return [f"data.path={Path(name).suffix[1:]}", f"data.data_files.train={folder / name}", *more]

    return make


def rows(rows: list[dict[str, object]], *more: str) -> Make:
    def make(folder: Path) -> Overrides:
        return ["data.path=json", f"data.data_files.train={write_rows(folder / 'train.jsonl', rows)}", *more]

    return make


def parquet_of(rows: list[dict[str, object]]) -> Make:
    def make(folder: Path) -> Overrides:
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
        return file("rows.parquet", (folder / "rows.parquet").read_bytes())(folder)

    return make


def cut_parquet(folder: Path) -> Overrides:
    overrides = parquet_of(list(ROWS))(folder)
    whole = (folder / "rows.parquet").read_bytes()
    (folder / "rows.parquet").write_bytes(whole[: len(whole) // 2])
    return overrides


def folder_for_a_file(folder: Path) -> Overrides:
    return ["data.path=json", f"data.data_files.train={folder}"]


def validation_of_other_columns(folder: Path) -> Overrides:
    other = write_rows(folder / "validation.jsonl", [{"body": "rain", "class": 1}] * 5)
    return [*rows(list(ROWS))(folder), f"data.data_files.validation={other}"]


def validation_with(row: dict[str, object]) -> Make:
    def make(folder: Path) -> Overrides:
        other = write_rows(folder / "validation.jsonl", [*ROWS[:5], row])
        return [*rows(list(ROWS))(folder), f"data.data_files.validation={other}"]

    return make


def question(**changes: object) -> dict[str, object]:
    answers = {"text": ["town"], "answer_start": [8]}
    return {"id": "1", "question": "where", "context": "rain in town", "answers": answers, **changes}


def answered(text: object, start: object) -> Make:
    wrong = question(answers={"text": text, "answer_start": start})
    return rows([question()] * 20 + [wrong], QUESTIONS)


def tokens(*last: dict[str, object]) -> Make:
    return rows([{"tokens": ["rain", "wind"], "tags": ["O", "B-X"]}] * 20 + list(last), TOKENS)


def teacher(folder: Path) -> Overrides:
    config = BertConfig(
        vocab_size=len(tiny.tokenizer()),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=2,
    )
    BertForSequenceClassification(config).save_pretrained(folder / "teacher")
    tiny.tokenizer().save_pretrained(folder / "teacher")
    return [f"teacher.model={folder / 'teacher'}", "teacher.training=null"]


def teacher_with(name: str, content: bytes | None) -> Make:
    """A teacher of whose files one is of other content, or gone."""

    def make(folder: Path) -> Overrides:
        overrides = teacher(folder)
        (folder / "teacher" / name).unlink()
        if content is not None:
            (folder / "teacher" / name).write_bytes(content)
        return overrides

    return make


class RunsACommand:
    """Unpickled without care it would leave a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def pickled_teacher(folder: Path) -> Overrides:
    overrides = teacher(folder)
    (folder / "teacher" / "model.safetensors").unlink()
    torch.save({"weight": RunsACommand(folder / "run")}, folder / "teacher" / "pytorch_model.bin")
    return overrides


def teacher_of_own_code(folder: Path) -> Overrides:
    overrides = teacher(folder)
    config = json.loads((folder / "teacher" / "config.json").read_text())
    config |= {"model_type": "their-own", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "teacher" / "config.json").write_text(json.dumps(config))
    (folder / "teacher" / "code.py").write_text(f"open({str(folder / 'run')!r}, 'w')\nclass Config: pass\n")
    return overrides


MORE_CASES: dict[str, Case] = {
    # files
    "json in latin-1": (
        file("a.json", LINES + '{"text": "café", "label": 1}\n'.encode("latin-1")),
        ("data.text", "row 20 of train", "UTF-8"),
    ),
    "csv in latin-1": (file("a.csv", CSV + "café,1\n".encode("latin-1")), ("data.path", "utf-8", "data.data_files")),
    "csv in utf-16": (file("a.csv", CSV.decode().encode("utf-16")), ("data.path", "cannot be read", "utf-8")),
    "json with a NUL byte": (file("a.json", LINES + b'{"text": "a\0b", "label": 1}\n'), ("data.path", "row 20")),
    "json of numbers": (file("a.json", b"1\n2\n"), ("data.path", "cannot be read")),
    "json of no bytes": (file("a.json", b""), ("data.path", "cannot be read")),
    "json with a row of other columns": (
        file("a.json", LINES + b'{"body": "rain"}\n'),
        ("data.text", "row 20 of train", "None is not a text"),
    ),
    "csv of no bytes": (file("a.csv", b""), ("data.path", "cannot be read")),
    "csv of a header alone": (file("a.csv", b"text,label\n"), ("data.path", "no data")),
    "csv with a longer row": (file("a.csv", CSV + b"rain,1,2,3\n"), ("data.path", "line 22")),
    "parquet cut off": (cut_parquet, ("data.path", "cannot be read", "Parquet")),
    "parquet that is json": (file("a.parquet", LINES), ("data.path", "cannot be read", "Parquet")),
    "folder for a file": (folder_for_a_file, ("data.path", "cannot be read")),
    "validation of other columns": (validation_of_other_columns, ("data.path", "cannot be read")),
    # texts and labels
    "text that is null": (rows([*ROWS, {"text": None, "label": 1}]), ("data.text", "row 20 of train", "not a text")),
    "text that is a list": (
        rows([{"text": ["rain"], "label": i % 2} for i in range(20)]),
        ("data.text", "row 0 of train", "not a text"),
    ),
    "label that is null": (rows([*ROWS, {"text": "rain", "label": None}]), ("data.label", "row 20 of train", "None")),
    "empty cells of a csv": (
        file("a.csv", CSV + b",1\n"),
        ("data.text", "row 20 of train (", "a.csv)", "None is not a text", "remove the row"),
    ),
    "label of an empty cell": (
        file("a.csv", CSV + b"rain,\n"),
        ("data.label", "row 20 of train (", "a.csv)", "label None", "remove the row"),
    ),
    "label that is not a number": (
        parquet_of([{**row, "label": float("nan") if index == 7 else 1.0} for index, row in enumerate(ROWS)]),
        ("data.label", "row 7 of train (", "the label is missing"),
    ),
    "null in a column of words": (
        rows([*({**row, "label": "ab"[index % 2]} for index, row in enumerate(ROWS)), {"text": "rain", "label": None}]),
        ("data.label", "row 20 of train", "None"),
    ),
    "parquet with a null text": (
        parquet_of([*ROWS, {"text": None, "label": 1}]),
        ("data.text", "row 20 of train", "rows.parquet"),
    ),
    "parquet with a null label": (
        parquet_of([*ROWS, {"text": "rain", "label": None}]),
        ("data.label", "row 20 of train", "rows.parquet"),
    ),
    "texts that are all null": (
        parquet_of([{**row, "text": None} for row in ROWS]),
        ("data.text", "row 0 of train", "None is not a text"),
    ),
    "labels that are all null": (parquet_of([{**row, "label": None} for row in ROWS]), ("data.label", "0 label(s)")),
    "second text that is null": (
        rows(
            [{**row, "other": None if index == 7 else "wind"} for index, row in enumerate(ROWS)], "data.text_pair=other"
        ),
        ("data.text_pair", "row 7 of train", "None is not a text"),
    ),
    "null where a list of labels is wanted": (
        rows([{"text": "rain", "label": [0, 1]}] * 20 + [{"text": "rain", "label": None}], MULTI),
        ("data.label", "row 20 of train", "None is not a list of labels"),
    ),
    "null in a list of labels": (
        rows([{"text": "rain", "label": [0, 1]}] * 20 + [{"text": "rain", "label": [0, None]}], MULTI),
        ("data.label", "row 20 of train", "None"),
    ),
    "number that is null": (
        rows(
            [{"text": "rain", "label": index / 20} for index in range(20)] + [{"text": "rain", "label": None}],
            REGRESSION,
        ),
        ("data.label", "row 20 of train", "None is not a number"),
    ),
    "tags that are null": (
        tokens({"tokens": ["rain"], "tags": None}),
        ("data.label", "row 20 of train", "not a list of tags"),
    ),
    "tokens that are null": (
        tokens({"tokens": None, "tags": ["O"]}),
        ("data.text", "row 20 of train", "not a list of words"),
    ),
    "answers that are null": (
        rows([question()] * 20 + [question(answers=None)], QUESTIONS),
        ("data.label", "row 20 of train"),
    ),
    "null among the answers": (answered(["town", None], [8, 8]), ("data.label", "row 20 of train", "not a text")),
    "answer that begins nowhere": (answered(["town"], [None]), ("data.label", "row 20 of train", "no whole number")),
    "question that is null": (
        rows([question()] * 20 + [question(question=None)], QUESTIONS),
        ("data.text", "row 20 of train", "None is not a text"),
    ),
    "null in a split of its own": (
        validation_with({"text": None, "label": 1}),
        ("data.text", "row 5 of validation (", "validation.jsonl)", "None is not a text"),
    ),
    "label between classes": (
        rows([*ROWS, {"text": "rain", "label": 0.5}]),
        ("data.label", "row 20 of train", "0.5", "regression"),
    ),
    "list where one label is wanted": (
        rows([{"text": "rain", "label": [index % 2]} for index in range(20)]),
        ("data.label", "row 0 of train", "[0]", "task.type"),
    ),
    "one label where a list is wanted": (rows(list(ROWS), MULTI), ("data.label", "row 0 of train", "not a list")),
    "label of a list outside the names": (
        rows([{"text": "rain", "label": [0, 1]}] * 20 + [{"text": "rain", "label": [9]}], MULTI, "data.labels=[a, b]"),
        ("data.label", "row 20 of train", "9", "a, b"),
    ),
    "name that stands twice": (rows(list(ROWS), "data.labels=[a, a]"), ("data.labels", "'a'", "twice")),
    "number that is none": (
        rows(
            [*({"text": "rain", "label": i / 20} for i in range(20)), {"text": "x", "label": float("nan")}], REGRESSION
        ),
        ("data.label", "row 20 of train", "nan is not a number"),
    ),
    "number that is infinite": (
        file("a.csv", b"text,label\n" + b"rain,0.5\n" * 20 + b"snow,inf\n", REGRESSION),
        ("data.label", "row 20 of train", "inf is not a number"),
    ),
    "number past float32": (
        rows([*({"text": "rain", "label": i / 20} for i in range(20)), {"text": "x", "label": 1e300}], REGRESSION),
        ("data.label", "row 20 of train", "too large"),
    ),
    "tokens in one string": (
        rows([{"tokens": "rain wind", "tags": ["O", "B-X"]}] * 20, TOKENS),
        ("data.text", "row 0 of train", "not a list of words"),
    ),
    "tags in one string": (
        rows([{"tokens": ["rain"], "tags": "O"}] * 20, TOKENS),
        ("data.label", "row 0 of train", "not a list of tags"),
    ),
    "no tokens": (tokens({"tokens": [], "tags": []}), ("data.text", "row 20 of train", "not a list of words")),
    "token that is null": (tokens({"tokens": [None], "tags": ["O"]}), ("data.text", "row 20 of train")),
    "answer that stands elsewhere": (answered(["town"], [3]), ("data.label", "row 20 of train", "'town'", "3")),
    "answer before the start": (answered(["town"], [-4]), ("data.label", "row 20 of train", "-4")),
    "answers without their starts": (answered(["town", "rain"], [8]), ("data.label", "row 20 of train", "differ")),
    "answers that are a string": (
        rows([question(answers="town")] * 20, QUESTIONS),
        ("data.label", "row 0 of train", "answer_start"),
    ),
    "no context": (
        rows([{"question": "where", "answers": {"text": ["a"], "answer_start": [0]}}] * 20, QUESTIONS),
        ("data.text_pair", "'context'", "question, answers"),
    ),
    # teachers
    "teacher's weights cut off": (
        teacher_with("model.safetensors", b"\x10\0\0\0\0\0\0\0{"),
        ("teacher.model", "weights"),
    ),
    "teacher's weights empty": (teacher_with("model.safetensors", b""), ("teacher.model", "weights")),
    "teacher's weights gone": (teacher_with("model.safetensors", None), ("teacher.model", "model.safetensors")),
    "teacher's config cut off": (teacher_with("config.json", b'{"model_type": '), ("teacher.model", "JSON")),
    "teacher's config of NUL bytes": (teacher_with("config.json", bytes(50)), ("teacher.model", "JSON")),
    "teacher's config without type": (teacher_with("config.json", b"{}"), ("teacher.model", "model_type")),
    "teacher's tokenizer cut off": (teacher_with("tokenizer.json", b"{"), ("teacher.model", "tokenizer")),
    "teacher that is a pickle": (pickled_teacher, ("teacher.model", "model.safetensors")),
    "teacher with code of its own": (teacher_of_own_code, ("teacher.model",)),
    # settings
    "epochs without end": (["task.logits.epochs=.inf"], ("task.logits.epochs", "finite")),
    "rate that is no number": (["task.logits.learning_rate=.nan"], ("task.logits.learning_rate", "finite")),
    "weight below zero": (["task.losses.logits.weight=-1"], ("task.losses.logits.weight", "-1")),
    "temperature of zero": (["task.losses.logits.temperature=0"], ("task.losses.logits.temperature", "greater than 0")),
    "half an example": (["task.logits.batch_size=2.5"], ("task.logits.batch_size", "integer")),
    "warm-up that never ends": (["task.logits.warmup_fraction=1.0"], ("task.logits.warmup_fraction", "less than 1")),
    "more than all rows": (["data.validation_split=1.5"], ("data.validation_split", "less than 1")),
    "too short a text": (["data.max_length=8"], ("data.max_length", "16")),
    "no checkpoint": (["runtime.keep_checkpoints=0"], ("runtime.keep_checkpoints", "greater than 0")),
    "no patience": (["runtime.process_timeout_seconds=0"], ("runtime.process_timeout_seconds", "greater than 0")),
    "unknown way out": (["runtime.on_nonfinite=ignore"], ("runtime.on_nonfinite", "'stop' or 'skip'")),
    "unknown precision": (["runtime.precision=fp8"], ("runtime.precision", "'bf16'")),
    "seed past 32 bits": (["seed=4294967296"], ("seed", "less than 4294967296")),
    "section that is a number": (["teacher=5"], ("teacher", "5")),
    "section that is a list": (["data=[1]"], ("data", "[1]")),
    "tracker that is no list": (["tracking=wandb"], ("tracking", "list")),
    "pairs of words": (["layer_map.pairs=[[a, b]]"], ("layer_map.pairs", "'a'")),
    "probability past one": (["augment.probability=2"], ("augment.probability", "less than or equal to 1")),
    "unknown stage to redo": (["--redo", "trian"], ("--redo", "'trian'", "teacher")),
    "object in YAML": (["seed=!!python/object/apply:os.getpid []"], ("seed=", "not YAML", "python/object")),
    "NUL byte in an override": (["data.path=a\0b"], ("not YAML",)),
}
