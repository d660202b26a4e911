"""Claims about distill/augmentation: only eligible words change, labels and spans survive, candidates are the published
ones, and a row's copies follow from seed, row and copy number alone."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.augmentation import (
    Augmenter,
    AugmentOptions,
    TextColumns,
    mark_replaced,
    read_counts,
    row_keys,
    shard_paths,
    write_shards,
)
from distill.settings import UserError

VOCABULARY = ["river", "lake", "stream", "mountain", "hill", "valley", "piano", "violin", "guitar", "drum"]


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten words with random vectors, as a GloVe text file."""
    path = tmp_path_factory.mktemp("vectors") / "vectors.txt"
    values = np.random.default_rng(3).normal(size=(len(VOCABULARY), 6))
    path.write_text(
        "".join(f"{w} {' '.join(f'{x:.5f}' for x in v)}\n" for w, v in zip(VOCABULARY, values, strict=True))
    )
    return path


def _options(vectors: Path | None, **more: Any) -> AugmentOptions:
    given = {"vectors": str(vectors) if vectors else None, "copies": 3, "candidates": 3, "probability": 0.5}
    return AugmentOptions(**(given | more))


def _augment(rows: list[dict[str, Any]], options: AugmentOptions, seed: int = 0, **more: Any) -> list[dict[str, Any]]:
    dataset = Dataset.from_list(rows)
    columns = more.pop("columns", None) or TextColumns.of(dataset.column_names)
    return list(Augmenter(dataset, options, columns=columns, seed=seed, **more).part(0, 1))


def _nearest(path: Path, word: str, count: int) -> set[str]:
    lines = [line.split() for line in path.read_text().splitlines()]
    matrix = np.array([[float(x) for x in line[1:]] for line in lines])
    words = [line[0] for line in lines]
    unit = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    order = np.argsort(-unit @ unit[words.index(word)])
    return set([words[index] for index in order if words[index] != word][:count])


def test_a_word_becomes_one_of_its_nearest_by_cosine(vectors: Path) -> None:
    rows = [{"text": f"the {word}", "label": 0} for word in VOCABULARY]
    made = _augment(rows, _options(vectors, copies=40, probability=1.0))
    for number, word in enumerate(VOCABULARY):
        seen = {row["text"].removeprefix("the ") for row in made if row["source_row"] == number}
        assert seen == _nearest(vectors, word, 3)


# One ideograph in sixteen words is a loan; many would make the set one that has no spaces.
sentences = st.builds(
    lambda words, loan: " ".join([*words[: len(words) // 2], *loan, *words[len(words) // 2 :]]),
    st.lists(
        st.sampled_from(
            [*VOCABULARY, "River", "PIANO", "the", "not", "42", "@user", "http://a.b/c", "naïve", "x", "--"]
        ),
        min_size=3,
        max_size=12,
    ),
    st.sampled_from([["mountain"], ["mountain", "日"]]),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.tuples(sentences, st.integers(0, 3)), min_size=1, max_size=6), seed=st.integers(0, 2**32))
def test_only_eligible_words_change_and_the_rest_stays(texts: list[tuple[str, int]], seed: int, vectors: Path) -> None:
    rows = [{"text": text, "label": label} for text, label in texts]
    for made in _augment(rows, _options(vectors), seed=seed):
        source = rows[made["source_row"]]
        assert made["label"] == source["label"]
        assert made["text"].strip()
        before, after = str(source["text"]).split(" "), made["text"].split(" ")
        assert len(before) == len(after)
        changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
        assert [f"{old}->{new}" for old, new in changed] == made["replaced"]
        assert changed
        for old, new in changed:
            assert old.lower() in VOCABULARY
            assert new.lower() in VOCABULARY
            assert (old.isupper(), old.istitle()) == (new.isupper(), new.istitle())


def test_about_p_of_the_words_are_replaced(vectors: Path) -> None:
    rows = [{"text": " ".join(VOCABULARY), "label": 0}]
    made = _augment(rows, _options(vectors, copies=400, probability=0.4))
    share = sum(len(row["replaced"]) for row in made) / (400 * len(VOCABULARY))
    # Four standard deviations of a mean of 4,000 draws are 0.031.
    assert abs(share - 0.4) < 0.031


def test_copies_follow_from_seed_row_and_copy_alone(vectors: Path) -> None:
    rows = [{"text": f"the {a} near the {b}", "label": 0} for a in VOCABULARY for b in VOCABULARY[:3]]
    dataset = Dataset.from_list(rows)
    augmenter = Augmenter(dataset, _options(vectors), columns=TextColumns.of(dataset.column_names), seed=5)
    whole = list(augmenter.part(0, 1))
    assert [row for index in range(7) for row in augmenter.part(index, 7)] == whole
    assert _augment(rows, _options(vectors), seed=5) == whole
    assert _augment(rows, _options(vectors), seed=6) != whole


def test_both_members_of_a_pair_vary_and_stay_together(vectors: Path) -> None:
    rows = [
        {"text": f"river number {index}", "text_pair": f"piano number {index}", "label": index % 2}
        for index in range(8)
    ]
    made = _augment(rows, _options(vectors, copies=5))
    assert {change.split("->")[0] for row in made for change in row["replaced"]} == {"river", "piano"}
    for row in made:
        number = row["source_row"]
        assert row["text"].endswith(f"number {number}")
        assert row["text_pair"].endswith(f"number {number}")
        assert row["label"] == number % 2


def test_tags_stay_aligned_and_entities_stay_whole(vectors: Path) -> None:
    rows = [{"tokens": ["River", "Hill", "has", "a", "piano", "."], "tags": [1, 2, 0, 0, 0, 0]}]
    columns = TextColumns.of(["tokens", "tags"], outside=0)
    made = _augment(rows, _options(vectors, copies=20), columns=columns)
    assert made
    for row in made:
        assert row["tags"] == rows[0]["tags"]
        assert len(row["tokens"]) == 6
        assert row["tokens"][:4] == ["River", "Hill", "has", "a"]
        assert row["tokens"][4] in VOCABULARY


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(st.sampled_from(VOCABULARY), min_size=3, max_size=9), at=st.integers(0, 6))
def test_an_answer_reads_the_same_at_its_new_place(words: list[str], at: int, vectors: Path) -> None:
    first = min(at, len(words) - 1)
    answer = " ".join(words[first : first + 2])
    start = len(" ".join(words[:first])) + (1 if first else 0)
    row = {
        "id": "1",
        "question": "which river",
        "context": " ".join(words),
        "answers": {"text": [answer], "answer_start": [start]},
    }
    for made in _augment([row], _options(vectors)):
        begin = made["answers"]["answer_start"][0]
        assert made["context"][begin : begin + len(answer)] == answer
        assert made["answers"]["text"] == [answer]


def test_copies_of_held_out_rows_and_duplicates_are_dropped(vectors: Path) -> None:
    rows = [{"text": "the river", "label": 0}]
    columns = TextColumns.of(["text", "label"])
    held_out = row_keys([{"text": f"The  {word}"} for word in VOCABULARY[1:]], TextColumns.of(["text"]))
    assert _augment(rows, _options(vectors, copies=30), columns=columns, excluded=held_out) == []
    made = _augment(rows, _options(vectors, copies=30, probability=1.0))
    assert len({row["text"] for row in made}) == len(made) == 3


def test_a_filter_decides_what_is_kept(vectors: Path) -> None:
    rows = [{"text": "the river and the piano", "label": 0}]
    made = _augment(rows, _options(vectors, copies=9), keep=lambda batch: [row["copy"] % 2 == 0 for row in batch])
    assert made
    assert all(row["copy"] % 2 == 0 for row in made)


def test_shards_are_written_whole_and_made_once(vectors: Path, tmp_path: Path) -> None:
    dataset = Dataset.from_list([{"text": f"the {word} {index}", "label": 0} for index, word in enumerate(VOCABULARY)])
    augmenter = Augmenter(dataset, _options(vectors), columns=TextColumns.of(dataset.column_names), seed=0)
    for rank in (1, 0):  # two processes, in any order
        paths = write_shards(tmp_path, augmenter, count=3, fingerprint="one", process=(rank, 2))
    assert paths == shard_paths(tmp_path, 3)
    assert sorted(tmp_path.iterdir()) == paths
    rows = [row for path in paths for row in Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))]
    assert rows == list(augmenter.part(0, 1))
    assert read_counts(paths)["kept"] == len(rows)
    times = [path.stat().st_mtime_ns for path in paths]
    write_shards(tmp_path, augmenter, count=3, fingerprint="one")
    assert [path.stat().st_mtime_ns for path in paths] == times
    write_shards(tmp_path, augmenter, count=3, fingerprint="another")
    assert all(path.stat().st_mtime_ns > before for path, before in zip(paths, times, strict=True))


def test_replaced_words_are_marked_on_both_sides(vectors: Path) -> None:
    rows = [{"text": "The river, the piano!", "label": 0}]
    columns = TextColumns.of(["text", "label"])
    made = _augment(rows, _options(vectors, probability=1.0), columns=columns)[0]
    ((source, augmented),) = mark_replaced(rows[0], made, columns, lambda word: f"<{word}>")
    assert source == "The <river>, the <piano>!"
    assert augmented.replace("<", "").replace(">", "") == made["text"]
    assert augmented.count("<") == 2


def test_gzip_and_a_word2vec_header_are_read(vectors: Path, tmp_path: Path) -> None:
    packed = tmp_path / "vectors.txt.gz"
    packed.write_bytes(gzip.compress(f"{len(VOCABULARY)} 6\n{vectors.read_text()}".encode()))
    rows = [{"text": "the river and the piano", "label": 0}]
    assert _augment(rows, _options(packed)) == _augment(rows, _options(vectors))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("river 1 2 3\nlake 1 2\n", "augment.vectors.*line 2"),
        ("river 1 2 3\nlake 1 x 3\n", "augment.vectors.*line 2"),
        ("", "augment.vectors"),
    ],
)
def test_a_broken_line_of_vectors_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "vectors.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        _augment([{"text": "river", "label": 0}], _options(tmp_path / "vectors.txt"))


def test_a_language_without_spaces_is_refused(vectors: Path) -> None:
    with pytest.raises(UserError, match="without spaces"):
        _augment([{"text": "今日は天気がいいです", "label": 0}], _options(vectors))
