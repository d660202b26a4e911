"""Claim: the blocked search for neighbours finds what sorting every float64 cosine finds, whatever the vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distill.augmentation import vectors as searched
from distill.augmentation.vectors import Neighbours, WordVectors

COUNT = 15


def by_sorting(words: list[str], matrix: np.ndarray, word: str) -> list[str]:
    """Every cosine in float64, sorted; the file's order between equals, the first of a word that comes twice."""
    if word not in words or not matrix[words.index(word)].any():
        return []
    usable = [i for i in range(len(words)) if matrix[i].any() and words.index(words[i]) == i]
    unit = matrix[usable] / np.linalg.norm(matrix[usable].astype(np.float64), axis=1, keepdims=True)
    own = usable.index(words.index(word))
    similarity = np.array([float(row @ unit[own]) for row in unit])
    order = sorted((i for i in range(len(usable)) if i != own), key=lambda i: -similarity[i])
    return [words[usable[i]] for i in order[:COUNT]]


def spread(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.standard_normal((count, 20))


def alike(rng: np.random.Generator, count: int) -> np.ndarray:
    """Nearer to each other than bf16 can tell."""
    return rng.standard_normal((1, 20)) + 1e-3 * rng.standard_normal((count, 20))


def opposite(rng: np.random.Generator, count: int) -> np.ndarray:
    """One on its own side, whose cosines with all others are negative."""
    rows = np.abs(rng.standard_normal((count, 20)))
    rows[0] = -rows[0]
    return rows


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("count", [1, 2, 17, 1000])
@pytest.mark.parametrize("make", [spread, alike, opposite])
def test_neighbours_are_those_of_sorting_every_cosine(
    make: object, count: int, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searched, "has_bf16", lambda device: bf16)
    monkeypatch.setattr(searched, "BLOCK_WORDS", 7)
    matrix = make(np.random.default_rng(count), count).astype(np.float32)  # type: ignore[operator]
    words = [f"w{i}" for i in range(count)]
    asked = words[:20]
    found = Neighbours(WordVectors(words, matrix), COUNT).find(asked)
    assert found == {word: by_sorting(words, matrix, word) for word in asked}


def test_an_empty_vector_is_near_nothing_and_a_word_counts_once() -> None:
    words = ["up", "down", "up", "none", "aside"]
    matrix = np.array([[0, 2], [0, -1], [1, 1], [0, 0], [3, 0]], np.float32)
    found = Neighbours(WordVectors(words, matrix), COUNT).find([*words, "unknown"])
    assert found == {
        "up": ["aside", "down"],
        "down": ["aside", "up"],
        "none": [],
        "aside": ["up", "down"],
        "unknown": [],
    }


def test_what_was_found_is_read_from_the_cache_of_the_same_vectors_alone(tmp_path: Path) -> None:
    matrix = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    words = [f"w{i}" for i in range(50)]
    found = Neighbours(WordVectors(words, matrix), 3, tmp_path).find(["w1"])
    again = Neighbours(WordVectors(words, matrix), 3, tmp_path)
    assert again.known == found
    assert not Neighbours(WordVectors(words, -matrix[::-1].copy()), 3, tmp_path).known
