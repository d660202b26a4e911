"""Properties of augmentation over drawn rows: what must stay stays, for every task type and any unicode, and the copies
do not depend on how the work is shared out. Examples with a known outcome are test_augmentation.py's."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForMaskedLM, AutoTokenizer

from distill import tiny
from distill.augmentation import Augmenter, AugmentOptions, MaskedLM, TextColumns, write_shards

VOCABULARY = ["river", "lake", "stream", "mountain", "hill", "valley", "piano", "violin", "guitar", "drum"]
MODEL_WORDS = ["rain", "snow", "song", "guitar", "people", "often", "talk", "long", "morning", "walk", "near", "town"]

Rows = list[dict[str, Any]]
property_test = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The vocabulary with random vectors, as a GloVe text file."""
    path = tmp_path_factory.mktemp("vectors") / "vectors.txt"
    values = np.random.default_rng(3).normal(size=(len(VOCABULARY), 6))
    lines = (f"{w} {' '.join(f'{x:.5f}' for x in v)}\n" for w, v in zip(VOCABULARY, values, strict=True))
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def masked_lm() -> MaskedLM:
    folder = tiny.teacher_folder()
    return AutoModelForMaskedLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def augmenter(rows: Rows, columns: TextColumns | None = None, **options: Any) -> Augmenter:
    dataset = Dataset.from_list(rows)
    seed, masked_lm = options.pop("seed", 0), options.pop("masked_lm", None)
    given = {"copies": 3, "candidates": 3, "probability": 0.5, **options}
    columns = columns or TextColumns.of(dataset.column_names)
    return Augmenter(dataset, AugmentOptions(**given), columns=columns, seed=seed, masked_lm=masked_lm)


def augmented(rows: Rows, columns: TextColumns | None = None, **options: Any) -> Rows:
    return list(augmenter(rows, columns, **options).part(0, 1))


def blanked(text: str) -> str:
    """The text with every word of the vocabulary, whatever its casing, made the same."""
    return re.sub("|".join(VOCABULARY), "\0", text, flags=re.IGNORECASE | re.ASCII)


# Two known words begin every text: at most a quarter of its letters is then of any script, and none is refused.
known = st.sampled_from([*VOCABULARY, *(word.title() for word in VOCABULARY), *(word.upper() for word in VOCABULARY)])
noise = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
texts = st.builds(
    lambda words, strange, at, border: f"river mountain{border}" + border.join([*words[:at], strange, *words[at:]]),
    st.lists(st.one_of(known, st.sampled_from(["the", "not", "42", "@user", "a.b", "naïve", "x"])), max_size=9),
    noise,
    st.integers(0, 9),
    st.sampled_from([" ", "  ", ", ", "\t", "\u00a0", " - "]),
)
labels = st.one_of(st.integers(0, 3), st.floats(0, 5), st.lists(st.sampled_from([0.0, 1.0]), min_size=3, max_size=3))


@property_test
@given(text=texts, pair=st.one_of(st.none(), texts), label=labels, seed=st.integers(0, 2**32))
def test_the_label_and_all_but_replaced_words_stay_in_any_script(
    text: str, pair: str | None, label: Any, seed: int, vectors: Path
) -> None:
    row = {"text": text, "label": label} | ({"text_pair": pair} if pair is not None else {})
    for made in augmented([row], vectors=str(vectors), seed=seed):
        assert made["label"] == label
        for name in ("text", "text_pair"):
            if name in row:
                assert made[name].strip()
                assert blanked(made[name]) == blanked(row[name])
        assert any(made[name] != row[name] for name in row)


@property_test
@given(text=texts)
def test_any_script_comes_back_from_the_files(
    text: str, vectors: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    source = augmenter([{"text": text, "label": 0}], vectors=str(vectors))
    paths = write_shards(folder, source, count=1, fingerprint="one")
    assert list(Dataset.from_parquet(str(paths[0]), cache_dir=str(folder))) == list(source.part(0, 1))


@property_test
@given(rows=st.lists(st.tuples(texts, texts), min_size=2, max_size=5), seed=st.integers(0, 2**32))
def test_a_pair_s_texts_stay_with_each_other(rows: list[tuple[str, str]], seed: int, vectors: Path) -> None:
    pairs = [{"text": f"{a} {i}", "text_pair": f"{b} {i}", "label": i} for i, (a, b) in enumerate(rows)]
    for made in augmented(pairs, vectors=str(vectors), seed=seed):
        assert made["label"] == made["source_row"]
        assert made["text"].endswith(f" {made['source_row']}")
        assert made["text_pair"].endswith(f" {made['source_row']}")


tokens = st.tuples(
    st.one_of(known, noise.filter(bool), st.sampled_from(["the", "river bank", "St."])), st.integers(0, 2)
)


@property_test
@given(drawn=st.lists(tokens, min_size=1, max_size=10), seed=st.integers(0, 2**32))
def test_tags_stay_and_so_do_the_tokens_they_mark(drawn: list[tuple[str, int]], seed: int, vectors: Path) -> None:
    drawn = [("river", 0), ("mountain", 0), *drawn]
    row = {"tokens": [token for token, _ in drawn], "tags": [tag for _, tag in drawn]}
    columns = TextColumns.of(["tokens", "tags"], outside=0)
    for made in augmented([row], columns, vectors=str(vectors), seed=seed):
        assert made["tags"] == row["tags"]
        for (old, tag), new in zip(drawn, made["tokens"], strict=True):
            if new != old:
                assert tag == 0
                assert {old.lower(), new.lower()} <= set(VOCABULARY)


@property_test
@given(
    context=texts,
    spans=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11), st.integers(0, 2)), min_size=1, max_size=3),
    question=texts,
    seed=st.integers(0, 2**32),
)
def test_every_answer_reads_the_same_at_its_new_place(
    context: str, spans: list[tuple[int, int, int]], question: str, seed: int, vectors: Path
) -> None:
    """Spans from one word to another, one over another, and such as begin inside a word."""
    words = [match.span() for match in re.finditer(r"\S+", context)]
    numbers = [(*sorted((one % len(words), other % len(words))), inside) for one, other, inside in spans]
    edges = [(min(words[first][0] + inside, words[last][1]), words[last][1]) for first, last, inside in numbers]
    answers = {"text": [context[a:b] for a, b in edges], "answer_start": [a for a, _ in edges]}
    row = {"id": "1", "question": question, "context": context, "answers": answers}
    columns = TextColumns.of(list(row))
    for made in augmented([row], columns, vectors=str(vectors), seed=seed):
        assert made["answers"]["text"] == answers["text"]
        for answer, start in zip(answers["text"], made["answers"]["answer_start"], strict=True):
            assert made["context"][start : start + len(answer)] == answer
        assert blanked(made["context"]) == blanked(context)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(probability=st.floats(0.05, 1), seed=st.integers(0, 2**32))
def test_the_replaced_share_is_p(probability: float, seed: int, vectors: Path) -> None:
    # A copy that is dropped as unchanged has nothing replaced: the share is over all copies that were drawn.
    rows = [{"text": " ".join(VOCABULARY * 6), "label": 0}]
    copies = 100
    made = augmented(rows, vectors=str(vectors), probability=probability, copies=copies, seed=seed)
    share = sum(len(row["replaced"]) for row in made) / (copies * 60)
    # Hoeffding: a mean of 6,000 independent draws is farther off than this once in 10**12 runs.
    assert abs(share - probability) < math.sqrt(math.log(2e12) / (2 * copies * 60))


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(st.lists(st.sampled_from(MODEL_WORDS), min_size=1, max_size=9), min_size=1, max_size=9),
    mode=st.sampled_from(["exact", "fast"]),
    seed=st.integers(0, 2**32),
)
def test_copies_do_not_depend_on_batch_size_or_processes(
    lines: list[list[str]],
    mode: str,
    seed: int,
    masked_lm: MaskedLM,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    rows = [{"text": " ".join(words), "label": index} for index, words in enumerate(lines)]
    longest = 2 * max(map(len, lines)) + 3  # word pieces, the text standing there twice

    def with_batches_of(sequences: int) -> Augmenter:
        options = {"vectors": None, "mode": mode, "candidates": 5, "batch_tokens": sequences * longest}
        return augmenter(rows, seed=seed, masked_lm=masked_lm, **options)

    alone, seven, many = (with_batches_of(sequences) for sequences in (1, 7, 64))
    expected = list(alone.part(0, 1))
    assert list(seven.part(0, 1)) == expected
    assert list(many.part(0, 1)) == expected
    folders = [tmp_path_factory.mktemp("shards") for _ in range(2)]
    for rank in (0, 1):
        shared = write_shards(folders[0], seven, count=3, fingerprint="one", process=(rank, 2))
    whole = write_shards(folders[1], many, count=3, fingerprint="one")
    assert [path.read_bytes() for path in shared] == [path.read_bytes() for path in whole]
    # The order of rows does not matter either: what a row's words may become is its own.
    candidates = {row["text"]: words for row, words in _choices(many, rows)}
    assert candidates == {row["text"]: words for row, words in _choices(alone, rows[::-1])}


def _choices(source: Augmenter, rows: Rows) -> list[tuple[dict[str, Any], list[list[str]]]]:
    passages = [source.columns.passages(row, source.left_alone)[0] for row in rows]
    return list(zip(rows, source.candidates.lists(passages), strict=True))
