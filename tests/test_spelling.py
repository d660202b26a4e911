"""Claims about a student of a cut vocabulary: it reads rows as its own tokenizer would read the text, each of the
teacher's pieces is answered for where its first letter is, and what the student shows there is what it shows alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from distill import training
from distill.activations import Activations, Needs, capture
from distill.data import Collator
from distill.spelling import Spelling
from distill.students import Student
from distill.teachers import resolve
from distill.vocabulary import CutVocabulary, VocabularyOptions, cut_vocabulary
from pipelines import general as general_stage
from pipelines import task as task_stage
from tests.builders import FEW_STEPS, TINY, succeed
from tests.test_vocabulary import FRUIT, WORDS, build, cut, cut_tokenizers, wordpiece

TEXTS = ["The goalkeeper's unbelievable save!", "Shares of café owners fell 3.2% in 2004.", "Quixotic zebras, naïve."]


def placed(teacher: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, text: str) -> list[int]:
    """By the letters that both tokenizers say their pieces are made of, special pieces aside."""
    spans = own(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    starts = [start for start, _ in teacher(text, return_offsets_mapping=True, add_special_tokens=False).offset_mapping]
    return [next(place for place, (begin, end) in enumerate(spans) if begin <= start < end) for start in starts]


@given(cut_tokenizers(), WORDS)
def test_words_are_spelt_as_the_students_tokenizer_spells_them(
    tokenizers: tuple[PreTrainedTokenizerBase, CutVocabulary], words: list[str]
) -> None:
    teacher, left = tokenizers
    text = " ".join(words)
    own, places = Spelling(left, teacher).row(teacher(text)["input_ids"])
    assert own == left.tokenizer(text)["input_ids"]
    assert places == placed(teacher, left.tokenizer, text)


@pytest.fixture(scope="module")
def minilm() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(resolve("all-minilm-l6-v2"))


@pytest.fixture(scope="module")
def few(minilm: PreTrainedTokenizerBase) -> CutVocabulary:
    """The pieces of all but the last of TEXTS."""
    counts = np.zeros(len(minilm), dtype=np.int64)
    for ids in minilm(TEXTS[:-1])["input_ids"]:
        np.add.at(counts, ids, 1)
    return cut_vocabulary(minilm, len(minilm), counts, VocabularyOptions())


def test_real_pairs_are_spelt_with_their_types(minilm: PreTrainedTokenizerBase, few: CutVocabulary) -> None:
    pairs = TEXTS, TEXTS[::-1]
    full, own = minilm(*pairs), few.tokenizer(*pairs)
    width = max(map(len, full["input_ids"]))
    batch = Spelling(few, minilm).batch(full["input_ids"], full["token_type_ids"], width)
    assert batch["own_input_ids"].shape[1] % 8 == 0
    for index, (ids, types) in enumerate(zip(own["input_ids"], own["token_type_ids"], strict=True)):
        valid = batch["own_attention_mask"][index].bool()
        assert valid.sum() == len(ids)
        assert batch["own_input_ids"][index][valid].tolist() == ids
        assert batch["own_token_type_ids"][index][valid].tolist() == types
        assert (batch["own_input_ids"][index][~valid] == few.tokenizer.pad_token_id).all()
        # Padding answers for padding, special pieces for special ones.
        length = len(full["input_ids"][index])
        places = batch["own_positions"][index]
        assert not valid[places[length:]].any()
        last = batch["own_last_positions"][index][:length]
        assert last.tolist() == [*(places[1:length] - 1).tolist(), len(ids) - 1]
        assert (places.diff() >= 0).all()
        ends = [place for place, number in enumerate(full["input_ids"][index]) if number == minilm.sep_token_id]
        assert [ids[places[end]] for end in ends] == [few.tokenizer.sep_token_id] * 2


def test_a_row_without_lost_pieces_needs_no_spelling_and_one_too_long_for_the_student_is_spelt_as_far_as_fits() -> None:
    teacher = wordpiece(FRUIT)
    left = cut(teacher, {"apple": 1, "plum": 1})
    spelling = Spelling(left, teacher, longest=6)
    assert spelling.batch(teacher(["apple plum", "plum"])["input_ids"], None, 8) == {}
    numbers = left.tokenizer.convert_tokens_to_ids
    fits, too_long = (teacher(text)["input_ids"] for text in ("pear plum", "pear pear"))
    assert spelling.row(fits) == (numbers(["p", "##e", "##a", "##r", "plum"]), [0, 4])
    assert spelling.row(too_long) == ([*numbers(["p", "##e", "##a", "##r"]), left.tokenizer.unk_token_id], [0, 4])
    batch = spelling.batch([fits, too_long], None, 6)
    assert batch["own_input_ids"].shape == (2, 6)
    assert batch["own_positions"].tolist() == [[0, 4, 5, 5, 5, 5], [0, 4, 5, 5, 5, 5]]
    assert batch["own_last_positions"].tolist() == [[3, 4, 5, 5, 5, 5], [3, 4, 5, 5, 5, 5]]


def test_a_row_may_begin_inside_a_word_and_a_word_without_a_spelling_is_unknown() -> None:
    teacher = wordpiece([*FRUIT, "日本"])
    left = cut(teacher, {"apple": 1, "app": 1})
    spelling, numbers = Spelling(left, teacher), teacher.convert_tokens_to_ids
    own = left.tokenizer.convert_ids_to_tokens
    ids, places = spelling.row(numbers(["[CLS]", "##le", "##s", "apple", "日本", "[UNK]"]))
    assert own(ids) == ["[CLS]", "##l", "##e", "##s", "apple", "[UNK]", "[UNK]"]
    assert places == [0, 1, 3, 4, 5, 6]


@pytest.mark.parametrize("length", [None, 40])
def test_the_student_is_seen_at_the_teachers_positions_as_it_is_alone(length: int | None, teacher) -> None:  # type: ignore[no-untyped-def]
    """teacher: of 60 embeddings, the pieces are 60 too. Each row alone, unpadded, as the deployed student reads it."""
    full = wordpiece(
        [*(f"word{letter}" for letter in "abcdefghij"), *"wordabcdefghij", *(f"##{c}" for c in "wordabcdefghij")]
    )
    left = cut_vocabulary(
        full, 60, np.eye(60, dtype=np.int64)[full.convert_tokens_to_ids("worda")], VocabularyOptions()
    )
    student: Student = build(teacher, left)
    texts = ["worda wordb", "wordc worda worda worde", "worda"]
    rows = {"input_ids": full(texts)["input_ids"]}
    batch = Collator(full, None, length=length, spelling=Spelling(left, full, 40))(rows, [1.0] * 3)
    needs = Needs(frozenset({0, 2}), frozenset({1}), logits=True, values=True)
    with torch.no_grad():
        seen = student(batch, needs)
        for index, text in enumerate(texts):
            alone = capture(student.model, left.tokenizer(text, return_tensors="pt"), needs)
            places = placed(full, left.tokenizer, text)
            torch.testing.assert_close(seen.logits[index], alone.logits[0])
            for layer in (0, 2):
                expected = student.project(layer, alone.hidden[layer][0, places])
                torch.testing.assert_close(seen.hidden[layer][index, : len(places)], expected)
            whole, own = alone.attention[1], seen.attention[1]
            for name in ("query", "key", "value"):
                expected = getattr(whole, name)[0][:, places]
                torch.testing.assert_close(getattr(own, name)[index][:, : len(places)], expected)
    assert batch["input_ids"].shape[1] == seen.hidden[0].shape[1] == (length or 8)


def test_logits_of_each_token_are_seen_where_the_teachers_are_and_spans_end_with_their_last_piece() -> None:
    logits = torch.arange(2 * 4 * 2).reshape(2, 4, 2).float()
    positions, ends = torch.tensor([[0, 3], [1, 1]]), torch.tensor([[2, 3], [1, 2]])
    found = Activations(logits=logits)
    assert torch.equal(found.at(positions).logits, logits[[[0], [1]], positions])
    assert found.at(positions, ends).logits.tolist() == [[[0, 5], [6, 7]], [[10, 11], [10, 13]]]
    of_rows = torch.ones(2, 3)
    assert Activations(logits=of_rows).at(positions).logits is of_rows


def test_an_answer_whose_last_word_was_cut_ends_with_the_last_letter_of_its_spelling() -> None:
    """A student that is sure of its own span, written by hand, is at the teacher's positions sure of the same words."""
    full = wordpiece(FRUIT)
    left = cut(full, {"apple": 1, "plum": 1})
    batch = Spelling(left, full).batch(full(["plum pear apple"])["input_ids"], None, 3)
    own = left.tokenizer.convert_ids_to_tokens(batch["own_input_ids"][0, :6])
    assert own == ["plum", "p", "##e", "##a", "##r", "apple"]
    logits = torch.zeros(1, 8, 2)
    logits[0, 1, 0] = logits[0, 4, 1] = 9  # starts at p, ends at ##r
    seen = Activations(logits=logits).at(batch["own_positions"], batch["own_last_positions"]).logits
    assert seen.argmax(1).tolist() == [[1, 1]]


@pytest.mark.parametrize("joint", ["true", "false"])
def test_every_phase_reads_the_same_words_as_the_teacher_with_no_piece_unknown(
    joint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[str, list[dict[str, Tensor]]] = {}
    fit = training.fit

    def watched(student: Student, teacher: Any, objective: Any, source: Any, *arguments: Any, **options: Any) -> Any:
        read[options["name"]] = [batch for step in source.steps(0, 3) for batch in step]
        return fit(student, teacher, objective, source, *arguments, **options)

    for stage in (general_stage, task_stage):
        monkeypatch.setattr(stage, "fit", watched)
    run = tmp_path / "run"
    # Short enough for the toy's 64 positions where every word is spelt in letters.
    short = ("general.max_length=16", "student.vocabulary={size: 92}", f"task.joint={joint}")
    succeed(TINY, *FEW_STEPS, *short, "--output", run)
    full, own = (AutoTokenizer.from_pretrained(run / folder) for folder in ("teacher/model", "student"))
    assert set(read) == {"general", "task.intermediate", "task.logits"}
    for batches in read.values():
        spelt = [batch for batch in batches if "own_input_ids" in batch]
        assert spelt
        for batch in spelt:
            assert not (batch["own_input_ids"] == own.unk_token_id).any()
            said = own.batch_decode(batch["own_input_ids"], skip_special_tokens=True)
            words = full.batch_decode(batch["input_ids"], skip_special_tokens=True)
            assert [text.replace(" ##", "") for text in said] == words
