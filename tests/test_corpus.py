"""Claims about distill/corpus.py: no piece of a document is lost, no border is unmarked, a stream is the same text."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import tiny
from distill.corpus import StreamBatches, load_corpus, pack
from distill.data import Collator, Placement, SourceOptions
from distill.settings import RunError, UserError
from tests.builders import write_rows

TOKENIZER = tiny.tokenizer()
FIRST, BORDER = TOKENIZER.cls_token_id, TOKENIZER.sep_token_id
WORDS = [*tiny.COMMON, *tiny.TOPICS["music"]]


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def documents(counts: list[int]) -> list[str]:
    """Documents of so many words, each one piece, running through the vocabulary."""
    words = itertools.cycle(WORDS)
    return [" ".join(next(words) for _ in range(count)) for count in counts]


def sequences_of(texts: list[str | None], length: int) -> list[list[int]]:
    return pack(Dataset.from_dict({"text": texts}), TOKENIZER, length)["input_ids"][:]


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any), length=st.integers(4, 20))
def test_no_piece_is_lost_and_every_border_is_marked(counts: list[int], length: int) -> None:
    texts = documents(counts)
    packed = sequences_of(texts, length)
    for sequence in packed:
        assert sequence[0] == FIRST
        assert sequence[-1] == BORDER
        assert 2 < len(sequence) <= length
    # A sequence that a border ends is one piece shorter; all others but the last are full.
    assert all(len(sequence) >= length - 1 for sequence in packed[:-1])

    pieces = TOKENIZER([text for text in texts if text], add_special_tokens=False)["input_ids"]
    inner = [[piece for piece in sequence if piece not in (FIRST, BORDER)] for sequence in packed]
    assert list(itertools.chain(*inner)) == list(itertools.chain(*pieces))
    # Where one document ends and the next begins, a [SEP] or the end of the sequence lies between them.
    ends = set(itertools.accumulate(len(document) for document in pieces))
    position = 0
    for sequence in packed:
        for left, right in itertools.pairwise(sequence[1:]):
            position += left != BORDER
            if position in ends and left != BORDER:
                assert right == BORDER


def test_packing_by_hand() -> None:
    rain, song, town = (TOKENIZER.convert_tokens_to_ids(word) for word in ("rain", "song", "town"))
    packed = sequences_of(["rain rain rain", "song", None, "  ", "town town"], 5)
    assert packed == [
        [FIRST, rain, rain, rain, BORDER],
        [FIRST, BORDER, song, BORDER],
        [FIRST, town, town, BORDER],
    ]


def test_many_documents_are_cut_a_thousand_at_a_time() -> None:
    packed = sequences_of(documents([3] * 2500), 16)
    count = sum(piece not in (FIRST, BORDER) for sequence in packed for piece in sequence)
    assert count == 7500
    assert sum(len(sequence) < 15 for sequence in packed) <= 3


def corpus_file(folder: Path, count: int = 60) -> str:
    texts = documents([row % 9 + 1 for row in range(count)])
    return write_rows(folder / "corpus.jsonl", [{"body": text, "other": 1} for text in texts])


def corpus(file: str, streaming: bool) -> Any:
    options = SourceOptions(path="json", data_files=file, text="body")
    return pack(load_corpus(options, streaming=streaming), TOKENIZER, 12)


def test_a_stream_is_cut_as_the_same_corpus_in_memory(tmp_path: Path) -> None:
    file = corpus_file(tmp_path)
    streamed = [row["input_ids"] for row in corpus(file, streaming=True)]
    assert streamed == corpus(file, streaming=False)["input_ids"][:]


@pytest.mark.parametrize("kind", ["text", "csv", "parquet"])
def test_a_corpus_of_other_files_streams_too(kind: str, tmp_path: Path) -> None:
    rows, file = Dataset.from_dict({"text": documents([5, 7, 2])}), tmp_path / f"rows.{kind}"
    if kind == "text":
        file.write_text("\n".join(rows["text"]), encoding="utf-8")
    else:
        getattr(rows, f"to_{kind}")(file)
    for streaming in (False, True):
        found = load_corpus(SourceOptions(path=kind, data_files=str(file)), streaming=streaming)
        assert [row["text"] for row in found] == rows["text"][:]


def stream_steps(file: str, first: int, last: int, **placement: int) -> list[list[list[int]]]:
    """The sequences of each step of one process, filling rows of weight 0 left out."""
    accumulation = placement.pop("accumulation", 1)
    batches = StreamBatches(
        corpus(file, streaming=True),
        Collator(TOKENIZER, None),
        batch_size=5,
        accumulation=accumulation,
        placement=Placement(**placement),
    )
    steps = []
    for micro_batches in batches.steps(first, last):
        assert len(micro_batches) == accumulation
        found = []
        for batch in micro_batches:
            lengths, weights = batch["attention_mask"].sum(1).tolist(), batch["example_weight"].tolist()
            rows = zip(batch["input_ids"].tolist(), lengths, weights, strict=True)
            found += [row[:length] for row, length, weight in rows if weight]
            assert all(weight in (0, pytest.approx(placement.get("processes", 1) / 5)) for weight in weights)
        steps.append(found)
    return steps


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (2, 2), (3, 2)])
def test_processes_share_each_step_without_overlap(processes: int, accumulation: int, tmp_path: Path) -> None:
    file = corpus_file(tmp_path)
    expected = corpus(file, streaming=False)["input_ids"][:20]
    shares = [
        stream_steps(file, 0, 4, processes=processes, rank=rank, accumulation=accumulation) for rank in range(processes)
    ]
    for step, parts in enumerate(zip(*shares, strict=True)):
        assert sorted(itertools.chain(*parts)) == sorted(expected[step * 5 : step * 5 + 5])


def test_a_stream_resumes_where_it_stopped_and_starts_again_at_its_end(tmp_path: Path) -> None:
    file = corpus_file(tmp_path, count=30)
    whole = stream_steps(file, 0, 9)
    assert stream_steps(file, 4, 9) == whole[4:]
    count = len(corpus(file, streaming=False))
    assert count < 45
    flat = list(itertools.chain(*whole))
    assert flat[count:] == flat[: 45 - count]


@pytest.mark.parametrize(
    ("options", "streaming", "message"),
    [
        ({"path": "tiny"}, True, r"general\.streaming: tiny is in memory already; set it to false"),
        ({"path": "tiny", "text": "body"}, False, r"general\.corpus\.text: there is no column 'body'.*text, label"),
        ({"path": "json", "data_files": "absent.jsonl"}, False, r"general\.corpus\.data_files: absent\.jsonl does not"),
        ({"path": "json", "data_files": "absent.jsonl"}, True, r"general\.corpus\.data_files: absent\.jsonl does not"),
        ({"path": "json", "data_files": {"dev": "a"}}, False, r"general\.corpus\.data_files: 'dev' is not a split"),
        ({"path": "no/set"}, False, r"general\.corpus\.path: no/set cannot be read"),
        ({"path": "no/set"}, True, r"general\.corpus\.path: no/set cannot be read"),
    ],
)
def test_a_corpus_that_cannot_be_read_names_its_key(options: dict[str, Any], streaming: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_corpus(SourceOptions(**options), streaming=streaming)


def test_a_corpus_without_a_training_split_is_refused(tmp_path: Path) -> None:
    for streaming in (False, True):
        with pytest.raises(UserError, match=r"general\.corpus\.data_files: there is no train split"):
            load_corpus(
                SourceOptions(path="json", data_files={"test": corpus_file(tmp_path)}, text="body"), streaming=streaming
            )


def test_a_document_that_is_no_text_is_refused() -> None:
    with pytest.raises(UserError, match=r"general\.corpus\.text: 5 is not a text"):
        pack(Dataset.from_dict({"text": [5]}), TOKENIZER, 16)


def test_a_file_that_vanishes_in_the_midst_ends_in_a_message(tmp_path: Path) -> None:
    """The stream opens its file again when it starts again."""
    file = Path(corpus_file(tmp_path, count=20))
    batches = StreamBatches(
        corpus(str(file), streaming=True),
        Collator(TOKENIZER, None),
        batch_size=5,
        accumulation=1,
        placement=Placement(),
    )
    steps = batches.steps(0, 20)
    next(steps)
    file.unlink()
    with pytest.raises(RunError, match=r"general\.corpus: reading it failed .*corpus\.jsonl.* start the same command"):
        list(steps)


def test_the_rows_of_a_step_are_those_it_reads(tmp_path: Path) -> None:
    file = corpus_file(tmp_path)
    in_order = [row["input_ids"] for row in corpus(file, streaming=True)]
    batches = StreamBatches(
        corpus(file, streaming=True), Collator(TOKENIZER, None), batch_size=5, accumulation=1, placement=Placement()
    )
    assert [in_order[row] for row in batches.rows(2)] == stream_steps(file, 2, 3)[0]


def test_an_empty_stream_ends_in_a_message(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "blank.jsonl", [{"body": " "}])
    with pytest.raises(UserError, match=r"general\.corpus: the stream holds no text"):
        stream_steps(file, 0, 1)
