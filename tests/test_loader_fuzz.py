"""Claims about files of any content at all: every loader takes them or refuses them in one message, and raises nothing
else, leaves nothing half written, comes to an end. A few files here, many behind `slow`."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from distill.augmentation.vectors import read_vectors
from distill.checkpoint import MANIFEST, STATE, damage_of
from distill.config import Config, dump_config, load_config
from distill.corpus import load_corpus
from distill.data import DataOptions, SourceOptions, load_task_data
from distill.settings import UserError
from distill.tasks import TASKS
from pipelines.pipeline import STARTED, read_record

FEW, MANY = 15, 300
WORDS = [
    "rain wind",
    "",
    " ",
    "a\0b",
    "\x1b[2J",
    "caf\u00e9",
    "\ud83d\ude00",
    "0",
    "-1",
    "nan",
    "[]",
    '"',
    "rain " * 3000,
]
CELL = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 5),
    st.integers(),
    st.floats(),
    st.sampled_from(WORDS),
    st.text(max_size=8),
)
VALUE = st.recursive(
    CELL,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "answer_start", "x"]), inner),
    max_leaves=6,
)
GOOD: dict[str, dict[str, Any]] = {
    "single_label_classification": {"text": "rain wind", "label": 1},
    "multi_label_classification": {"text": "rain wind", "label": [0, 1]},
    "regression": {"text": "rain wind", "label": 0.5},
    "token_classification": {"tokens": ["rain", "wind"], "tags": ["O", "B-X"]},
    "question_answering": {
        "id": "1",
        "question": "where",
        "context": "rain in town",
        "answers": {"text": ["town"], "answer_start": [8]},
    },
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def few(*strategies: st.SearchStrategy[Any]) -> Callable[[Any], Any]:
    return _examples(FEW, *strategies)


def many(*strategies: st.SearchStrategy[Any]) -> Callable[[Any], Any]:
    return _examples(MANY, *strategies)


def _examples(count: int, *strategies: st.SearchStrategy[Any]) -> Callable[[Any], Any]:
    health = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    chosen = settings(
        max_examples=count, deadline=30_000, suppress_health_check=health
    )  # a file that hangs is no success
    return lambda test: chosen(given(*strategies)(test))


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes that were changed in a few places, cut off or put twice."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        change = draw(st.sampled_from(["flip", "cut", "insert", "remove", "repeat"]))
        if change == "flip" and content:
            content[at] ^= draw(st.integers(1, 255))
        elif change == "cut":
            del content[at:]
        elif change == "insert":
            content[at:at] = draw(
                st.binary(max_size=5) | st.sampled_from([b"\0", b"\xef\xbb\xbf", b"\r", b'"', b"\n\n"])
            )
        elif change == "remove":
            del content[at : at + draw(st.integers(1, 20))]
        else:
            content += content[at:]
    return bytes(content)


def taken_or_refused(load: Callable[[], Any]) -> bool:
    """Whether it was taken; whatever else is raised fails the test."""
    try:
        load()
        return True
    except UserError as error:
        told = str(error)
    assert told.strip()
    assert "\n" not in told
    return False


# ---- rows of any content


@st.composite
def tables(draw: st.DrawFn) -> tuple[str, list[dict[str, Any]]]:
    """A task, and good rows of which a few cells are anything."""
    task = draw(st.sampled_from(sorted(GOOD)))
    rows = [dict(GOOD[task]) for _ in range(12)]
    if task == "single_label_classification":
        rows = [{**row, "label": index % 2} for index, row in enumerate(rows)]
    for _ in range(draw(st.integers(1, 3))):
        column = draw(st.sampled_from(sorted(GOOD[task])))
        value = draw(VALUE)
        for row in rows if draw(st.booleans()) else rows[draw(st.integers(0, 11)) :][:1]:
            if draw(st.integers(0, 9)):
                row[column] = value
            else:
                row.pop(column, None)
    return task, rows


def load_rows(task: str, kind: str, content: bytes, folder: Path) -> bool:
    file = folder / f"rows.{kind}"
    file.write_bytes(content)
    path = "json" if kind == "json.gz" else kind

    def load() -> None:
        data = load_task_data(DataOptions(path=path, data_files=str(file)), TASKS[task], seed=1)
        assert {"train", "validation", "test"} <= set(data.splits)

    return taken_or_refused(load)


def check_rows(drawn: tuple[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    task, rows = drawn
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    load_rows(task, "json", lines.encode("utf-8", "surrogatepass"), tmp_path)
    try:
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "made.parquet")
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError):
        return  # no such table can be
    load_rows(task, "parquet", (tmp_path / "made.parquet").read_bytes(), tmp_path)


@few(tables())
def test_rows_of_any_content_are_taken_or_refused(tmp_path: Path, drawn: Any) -> None:
    check_rows(drawn, tmp_path)


@pytest.mark.slow
@many(tables())
def test_many_rows_of_any_content_are_taken_or_refused(tmp_path: Path, drawn: Any) -> None:
    check_rows(drawn, tmp_path)


# ---- files of any bytes

ROWS = [{"text": f"rain wind {index}", "label": index % 2} for index in range(12)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def _parquet_bytes() -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


FILES = {
    "json": LINES,
    "json.gz": gzip.compress(LINES, mtime=0),
    "csv": ("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS)).encode(),
    "parquet": _parquet_bytes(),
    "text": "".join(f"{row['text']}\n" for row in ROWS).encode(),
}
ANY_FILE = st.sampled_from(sorted(FILES)).flatmap(lambda kind: st.tuples(st.just(kind), damaged(FILES[kind])))


def check_file(drawn: tuple[str, bytes], tmp_path: Path) -> None:
    kind, content = drawn
    load_rows("single_label_classification", kind, content, tmp_path)
    path = "json" if kind == "json.gz" else kind
    for streaming in (False, True):
        options = SourceOptions(path=path, data_files=str(tmp_path / f"rows.{kind}"))
        taken_or_refused(lambda: load_corpus(options, streaming=streaming))  # noqa: B023


@few(ANY_FILE)
def test_damaged_files_are_taken_or_refused(tmp_path: Path, drawn: Any) -> None:
    check_file(drawn, tmp_path)


@pytest.mark.slow
@many(ANY_FILE)
def test_many_damaged_files_are_taken_or_refused(tmp_path: Path, drawn: Any) -> None:
    check_file(drawn, tmp_path)


# ---- word vectors, configs, manifests: cheap enough to draw many

VECTORS = b"3 4\n" + b"".join(f"word{index} 0.1 -2 3e-1 {index}\n".encode() for index in range(3))


@_examples(200, damaged(VECTORS) | damaged(gzip.compress(VECTORS, mtime=0)) | st.binary(max_size=60))
def test_damaged_word_vectors_are_taken_or_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "vectors.txt").write_bytes(content)
    taken_or_refused(lambda: read_vectors(str(tmp_path / "vectors.txt"), limit=100))


@_examples(200, damaged(dump_config(Config()).encode()) | st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_damaged_configs_are_taken_or_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    taken_or_refused(lambda: load_config(tmp_path / "config.yaml"))


@_examples(100, st.text(max_size=30))
def test_overrides_of_any_text_are_taken_or_refused(tmp_path: Path, override: str) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    taken_or_refused(lambda: load_config(tmp_path / "config.yaml", [override]))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "checkpoint-00000001").mkdir()
    (tmp_path / "checkpoint-00000001" / STATE).write_text("{}")
    return tmp_path / "checkpoint-00000001"


def _manifest() -> bytes:
    seal = {"bytes": 2, "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}
    return json.dumps({"files": {STATE: seal}, "best": None}).encode()


STARTED_JSON = json.dumps({"key": "1f", "inputs": {"seed": 1}, "after": {"teacher": "2e"}}).encode()
ANY_JSON = VALUE.map(lambda value: json.dumps(value).encode()) | st.just(b"[" * 20_000)


@_examples(200, damaged(STARTED_JSON) | ANY_JSON)
def test_a_stages_record_is_taken_only_where_it_holds_what_is_read_of_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "started.json").write_bytes(content)
    record = read_record(tmp_path / "started.json", STARTED)
    assert record is None or {"key", "inputs", "after"} <= record.keys()


@example(json.dumps({"files": {"\n": None, STATE: None}, "best": None}).encode())
@_examples(
    300,
    damaged(_manifest())
    | st.binary(max_size=30)
    | st.fixed_dictionaries(
        {"files": VALUE | st.dictionaries(st.just(STATE) | st.text(max_size=300), VALUE), "best": VALUE}
    ).map(lambda value: json.dumps(value).encode())
    | ANY_JSON,
)
def test_a_damaged_manifest_is_told_and_trusted_only_where_it_says_the_same(checkpoint: Path, content: bytes) -> None:
    (checkpoint / MANIFEST).write_bytes(content)
    damage = damage_of(checkpoint)
    if damage is None:
        told = json.loads(content)
        assert told["files"][STATE] == json.loads(_manifest())["files"][STATE]
    else:
        assert "\n" not in damage
