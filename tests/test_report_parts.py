"""Claims about the computed parts of the report: calibration, attention maps and their overlap, the best answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from distill import tiny
from distill.activations import Needs, capture
from distill.attention import show_attention
from distill.evaluation import exact_match, token_f1
from pipelines.report.calibration import reliability
from pipelines.report.maps import Sentence, attention_maps, overlap


def test_calibration_by_hand() -> None:
    """One right at 0.95, one wrong at 0.85, one of two right at 0.55: (0.05 + 0.85 + 2 * 0.05) / 4."""
    found = reliability(np.array([0.95, 0.85, 0.55, 0.55]), np.array([True, False, True, False]))
    assert found.expected_error == pytest.approx(0.25)
    assert found.overconfidence == pytest.approx((0.95 + 0.85 + 0.55 + 0.55 - 2) / 4)
    assert found.counts.tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 1, 1]
    assert np.isnan(found.said[0])


def test_a_probability_on_an_edge_belongs_to_the_bin_below() -> None:
    counts = reliability(np.array([0.0, 0.1, 1.0]), np.array([True] * 3)).counts
    assert counts.tolist() == [2, 0, 0, 0, 0, 0, 0, 0, 0, 1]


def test_overlap_by_hand() -> None:
    teacher, student = np.array([[0.5, 0.5], [1.0, 0.0]]), np.array([[0.75, 0.25], [0.0, 1.0]])
    assert overlap(teacher, student) == pytest.approx((0.75 + 0.0) / 2)
    assert overlap(teacher, teacher) == 1


def test_attention_is_the_softmax_of_the_captured_scores(build_model: Callable[..., Any]) -> None:
    """The maps are transformers' eager attention; the oracle is this project's capture, which stays SDPA."""
    tokenizer = tiny.tokenizer()
    shape = {"vocab_size": len(tokenizer)}
    seen = attention_maps(build_model(**shape), tokenizer, Sentence("rain and wind every morning", None, ""))
    other = build_model(**shape)
    show_attention(other)
    batch = tokenizer("rain and wind every morning", return_tensors="pt")
    with torch.inference_mode():
        captured = capture(other, batch, Needs(attention=frozenset({1, 2, 3, 4}))).attention
    for layer in range(1, 5):
        expected = captured[layer].scores().softmax(-1)[0].mean(0).numpy()
        np.testing.assert_allclose(seen.layers[layer - 1], expected, atol=1e-6)
    assert seen.pieces[:3] == ["[CLS]", "rain", "a"]
    assert not seen.was_cut


def test_the_best_of_several_answers_counts() -> None:
    assert exact_match("The piano.", ["a song", "piano"])
    assert token_f1("the loud piano", ["song", "piano"]) == pytest.approx(2 / 3)
