"""Claims about which teacher layer teaches which student layer."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from distill.layer_map import LayerMapOptions, build_layer_map, nearest_layer
from distill.settings import UserError


@pytest.mark.parametrize(
    ("students", "teachers", "expected"),
    [
        (4, 12, [3, 6, 9, 12]),  # TinyBERT4, g(m) = 3 m
        (6, 12, [2, 4, 6, 8, 10, 12]),  # TinyBERT6, g(m) = 2 m
        (6, 6, [1, 2, 3, 4, 5, 6]),
        (1, 12, [12]),
        (4, 6, [2, 3, 5, 6]),  # 1.5 and 4.5 go up
        (5, 12, [2, 5, 7, 10, 12]),  # 2.4, 4.8, 7.2, 9.6, 12
    ],
)
def test_uniform_takes_the_nearest_layer_in_proportion(students: int, teachers: int, expected: list[int]) -> None:
    layers = build_layer_map(LayerMapOptions(), students, teachers)
    assert layers.attention == layers.hidden == tuple(enumerate(expected, start=1))


@given(st.integers(1, 48), st.integers(1, 48))
def test_uniform_is_round_half_up_of_the_exact_fraction(first: int, second: int) -> None:
    students, teachers = sorted((first, second))
    chosen = [g for _, g in build_layer_map(LayerMapOptions(), students, teachers).hidden]
    assert chosen == [floor(Fraction(m * teachers, students) + Fraction(1, 2)) for m in range(1, students + 1)]
    assert chosen[-1] == teachers
    assert sorted(set(chosen)) == chosen, "two student layers share a teacher layer"


@given(st.integers(1, 48), st.integers(1, 48))
def test_a_layer_that_no_pair_names_is_made_from_the_one_that_uniform_would_map(first: int, second: int) -> None:
    """One rounding for both; a float's would take layer 2 of 4 for layer 1 of 2 from 5, where halves go up to 3."""
    students, teachers = sorted((first, second))
    only_last = build_layer_map(LayerMapOptions(strategy="last"), students, teachers)
    uniform = build_layer_map(LayerMapOptions(), students, teachers)
    assert tuple((m, only_last.source(m)) for m in range(1, students + 1)) == uniform.hidden


def test_first_weights_come_from_the_hidden_partner_then_the_attentions_then_the_nearest() -> None:
    options = LayerMapOptions(hidden_pairs=[(1, 6)], attention_pairs=[(1, 2), (2, 5)])
    layers = build_layer_map(options, 4, 6)
    assert [layers.source(m) for m in (1, 2, 3, 4)] == [6, 5, 5, 6]  # 4.5 goes up


def test_a_student_deeper_than_its_teacher_begins_with_the_first_layer() -> None:
    assert [nearest_layer(m, 10, 2) for m in range(1, 11)] == [1, 1, 1, 1, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [("top", ((1, 4), (2, 5), (3, 6))), ("bottom", ((1, 1), (2, 2), (3, 3))), ("last", ((3, 6),))],
)
def test_other_strategies(strategy: str, expected: tuple[tuple[int, int], ...]) -> None:
    layers = build_layer_map(LayerMapOptions(strategy=strategy), 3, 6)
    assert layers.attention == layers.hidden == expected


def test_explicit_pairs_replace_the_strategy_in_the_order_of_student_layers() -> None:
    layers = build_layer_map(LayerMapOptions(strategy="top", pairs=[(3, 1), (1, 1)]), 3, 6)
    assert layers.attention == layers.hidden == ((1, 1), (3, 1))


def test_own_pairs_of_one_kind_leave_the_other_to_the_rest() -> None:
    layers = build_layer_map(LayerMapOptions(attention_pairs=[(2, 5)]), 2, 6)
    assert layers.attention == ((2, 5),)
    assert layers.hidden == ((1, 3), (2, 6))
    layers = build_layer_map(LayerMapOptions(pairs=[(1, 1)], hidden_pairs=[(2, 5)]), 2, 6)
    assert layers.attention == ((1, 1),)
    assert layers.hidden == ((2, 5),)


def test_a_student_deeper_than_its_teacher_needs_explicit_pairs() -> None:
    with pytest.raises(UserError, match=r"has 4 layers and the teacher 3.*student\.layers.*layer_map\.pairs"):
        build_layer_map(LayerMapOptions(), 4, 3)
    build_layer_map(LayerMapOptions(pairs=[(4, 3)]), 4, 3)
    build_layer_map(LayerMapOptions(attention_pairs=[(4, 3)], hidden_pairs=[(4, 3)]), 4, 3)


@pytest.mark.parametrize("key", ["pairs", "attention_pairs", "hidden_pairs"])
@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([(1, 7)], r"\[1, 7\] points past the last layer.*1 to 3, the teacher 1 to 6"),
        ([(4, 1)], r"\[4, 1\] points past the last layer"),
        ([(1, 2), (1, 3)], "stands in two pairs"),
        ([], "names no pair"),
    ],
)
def test_wrong_pairs_are_refused_under_their_key(key: str, pairs: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(UserError, match=rf"^layer_map\.{key}: .*{message}"):
        build_layer_map(LayerMapOptions(**{key: pairs}), 3, 6)


def test_one_teacher_layer_may_teach_several_student_layers() -> None:
    assert build_layer_map(LayerMapOptions(pairs=[(1, 6), (2, 6)]), 3, 6).hidden == ((1, 6), (2, 6))


@pytest.mark.parametrize("wrong", [{"pairs": [(0, 1)]}, {"pairs": [(1, 0)]}, {"strategy": "middle"}, {"pair": []}])
def test_layers_count_from_one_and_unknown_names_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LayerMapOptions(**wrong)


def test_the_description_tells_both_maps_where_they_differ() -> None:
    assert build_layer_map(LayerMapOptions(), 3, 6).describe() == "student 1 2 3 <- teacher 2 4 6"
    differing = build_layer_map(LayerMapOptions(attention_pairs=[(3, 5)]), 3, 6)
    assert differing.describe() == "attention: student 3 <- teacher 5; hidden: student 1 2 3 <- teacher 2 4 6"
