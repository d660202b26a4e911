"""Claims about a cut vocabulary: what it keeps, that words whose pieces are kept are read as before, that the student
starts with the teacher's rows, and that a run with one goes through and loads anywhere."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from distill import tiny
from distill.activations import Needs, capture
from distill.initialization import copy_layers, cut_student
from distill.layer_map import LayerMapOptions, build_layer_map
from distill.settings import UserError
from distill.students import Student, StudentOptions, build_student, load_body, student_config
from distill.tasks import TASKS
from distill.teachers import resolve
from distill.vocabulary import CutVocabulary, VocabularyOptions, cut_vocabulary
from tests.builders import FEW_STEPS, TINY, finished_run, run_cli, run_tinybert, succeed
from tests.doctor_cases import other_tokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def wordpiece(pieces: list[str]) -> PreTrainedTokenizerBase:
    core = Tokenizer(
        models.WordPiece(
            {piece: number for number, piece in enumerate(dict.fromkeys([*SPECIAL, *pieces]))}, unk_token="[UNK]"
        )
    )
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=core, **dict(zip(names, SPECIAL, strict=True)))


def cut(tokenizer: PreTrainedTokenizerBase, counts: dict[str, int], **options: object) -> CutVocabulary:
    numbers = np.zeros(len(tokenizer), dtype=np.int64)
    for piece, count in counts.items():
        numbers[tokenizer.convert_tokens_to_ids(piece)] = count
    return cut_vocabulary(tokenizer, len(tokenizer), numbers, VocabularyOptions(**options))


def kept(vocabulary: CutVocabulary) -> set[str]:
    return set(vocabulary.tokenizer.get_vocab())


# Which pieces stay

FRUIT = ["apple", "app", "##le", "pear", "plum", "##s", "é", "##é", "日", *"aelprsum", *(f"##{c}" for c in "aelprsum")]


def test_special_pieces_and_characters_stay_and_of_the_others_those_that_occur() -> None:
    left = cut(wordpiece(FRUIT), {"apple": 3, "##s": 2, "plum": 1})
    characters = {piece for piece in FRUIT if len(piece.removeprefix("##")) == 1}
    assert kept(left) == {*SPECIAL, "apple", "plum"} | characters - {"é", "##é", "日"}
    assert left.coverage == 1


def test_characters_of_the_text_stay_that_ascii_does_not_have() -> None:
    assert {"é", "##é"} <= kept(cut(wordpiece(["café", *FRUIT]), {"café": 1}))


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        ({"min_count": 2}, {"plum"}),
        ({"size": 5 + 16 + 1}, {"pear", "plum"}),
        ({"coverage": 0.5}, {"pear", "plum"}),
        ({"coverage": 0.9}, {"plum"}),
    ],
)
def test_rare_pieces_are_cut_where_asked_for(options: dict[str, float], gone: set[str]) -> None:
    left = cut(wordpiece(FRUIT), {"apple": 5, "##s": 1, "pear": 3, "plum": 1}, **options)
    assert {"apple", "pear", "plum"} - kept(left) == gone
    lost = {"pear": 3, "plum": 1}
    assert left.coverage == pytest.approx(1 - sum(lost[piece] for piece in gone) / 10)


def test_pieces_that_the_text_lacks_fill_what_is_left_in_the_order_of_their_numbers() -> None:
    tokenizer = wordpiece(["[unused0]", "日", "[unused17]", *FRUIT])
    size = len(SPECIAL) + 16 + 3
    left = cut(tokenizer, {"pear": 1, "##s": 2}, size=size, min_count=0)
    characters = {piece for piece in FRUIT if len(piece.removeprefix("##")) == 1} - {"é", "##é", "日"}
    assert kept(left) == {*SPECIAL, *characters, "pear", "apple", "app"}
    assert left.coverage == 1


def test_without_a_size_no_row_is_kept_that_no_text_can_ask_for() -> None:
    """[unused0] and the like, characters that the text lacks, rows behind the last piece."""
    tokenizer = wordpiece(["[unused0]", *FRUIT])
    counts = np.zeros(len(tokenizer) + 6, dtype=np.int64)
    left = cut_vocabulary(tokenizer, len(counts), counts, VocabularyOptions(min_count=0))
    assert kept(left) == {*SPECIAL, *FRUIT} - {"é", "##é", "日"}
    assert len(left.kept) == len(kept(left))


def test_fewer_pieces_than_must_stay_are_refused() -> None:
    with pytest.raises(UserError, match=r"student\.vocabulary\.size: 20 is too few: .* are 21"):
        cut(wordpiece(FRUIT), {"apple": 1, "##s": 1}, size=20)


# What the rebuilt tokenizer makes of a text


@st.composite
def cut_tokenizers(draw: st.DrawFn) -> tuple[PreTrainedTokenizerBase, CutVocabulary]:
    """A tokenizer of words of a, b and c, and what is left of it when pieces are taken out at random."""
    pieces = draw(st.sets(st.text("abc", min_size=2, max_size=4), max_size=12))
    tails = draw(st.sets(st.text("abc", min_size=2, max_size=3), max_size=12))
    keep = draw(st.randoms(use_true_random=False))
    vocabulary = [*"abc", "##a", "##b", "##c", *sorted(pieces), *(f"##{tail}" for tail in sorted(tails))]
    teacher = wordpiece(vocabulary)
    return teacher, cut(teacher, {piece: keep.randint(0, 1) for piece in vocabulary})


WORDS = st.lists(st.text("abc", min_size=1, max_size=9), min_size=1, max_size=12)


@given(cut_tokenizers(), WORDS)
def test_words_whose_pieces_are_kept_are_read_as_before_and_others_up_to_the_first_that_is_gone(
    tokenizers: tuple[PreTrainedTokenizerBase, CutVocabulary], words: list[str]
) -> None:
    teacher, left = tokenizers
    for word in words:
        before = teacher.tokenize(word)
        now = left.tokenizer.tokenize(word)
        staying = [piece in kept(left) for piece in before]
        intact = staying.index(False) if False in staying else len(before)
        assert now[:intact] == before[:intact]
        assert "".join(piece.removeprefix("##") for piece in now) == word
        if all(staying):
            ids = torch.tensor(teacher.convert_tokens_to_ids(before))
            assert left.tokenizer.convert_tokens_to_ids(now) == left.to_student[ids].tolist()


def test_real_text_is_read_as_before_and_unseen_words_without_unknown_pieces() -> None:
    teacher = AutoTokenizer.from_pretrained(resolve("all-minilm-l6-v2"))
    texts = ["The goalkeeper's unbelievable save!", "Shares of café owners fell 3.2% in 2004."]
    counts = np.zeros(len(teacher), dtype=np.int64)
    for ids in teacher(texts)["input_ids"]:
        np.add.at(counts, ids, 1)
    left = cut_vocabulary(teacher, len(teacher), counts, VocabularyOptions())
    assert len(left.kept) < 300
    for pair in (None, texts[::-1]):
        before, now = teacher(texts, pair), left.tokenizer(texts, pair)
        for old, new in zip(before["input_ids"], now["input_ids"], strict=True):
            assert left.to_student[torch.tensor(old)].tolist() == new
        assert before["token_type_ids"] == now["token_type_ids"]
    unseen = left.tokenizer.tokenize("Quixotic zebras, naïvely jumping @ 12:45 [MASK]")
    assert "[UNK]" not in unseen
    assert "[MASK]" in unseen
    assert left.tokenizer.tokenize("日本") == ["[UNK]", "[UNK]"]


def test_it_is_saved_and_read_back_as_it_is(tmp_path: Path) -> None:
    left = cut(tiny.tokenizer(), {"rain": 3, "song": 1})
    left.tokenizer.save_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read.get_vocab() == left.tokenizer.get_vocab()
    assert read("rain and song", "often")["input_ids"] == left.tokenizer("rain and song", "often")["input_ids"]
    assert (read.pad_token_id, read.sep_token) == (left.tokenizer.pad_token_id, "[SEP]")
    assert "vocabulary-" not in "".join(file.read_text() for file in tmp_path.iterdir())


# First weights


def build(teacher, vocabulary: CutVocabulary | None, **changes: object) -> Student:  # type: ignore[no-untyped-def]
    shape = {"layers": 2, "width": 16, "heads": 2, "intermediate_size": 24, "dropout": 0.0}
    options = StudentOptions(**{**shape, **changes})
    full = teacher.config if vocabulary is None else vocabulary.config(teacher.config)
    task = TASKS["single_label_classification"]
    return build_student(student_config(full, options), task, options, 16, 0, vocabulary).eval()


@pytest.fixture
def part() -> CutVocabulary:
    """Of 60 pieces, the embeddings of conftest's teacher: special ones, four characters, and every other word."""
    words = [f"word{number}" for number in range(51)]
    return cut(wordpiece([*words, *"abcd"]), dict.fromkeys(words[::2], 1))


@pytest.mark.parametrize("width", [16, 12])
def test_the_student_starts_with_the_teachers_rows(width: int, teacher, make_batch, part: CutVocabulary) -> None:
    layers = build_layer_map(LayerMapOptions(), 2, 4)
    students = [build(teacher, vocabulary, width=width) for vocabulary in (None, part)]
    # A sample of kept pieces alone: what else the cut fits is then the same with both vocabularies.
    batch = make_batch()
    batch["input_ids"] = part.kept[batch["input_ids"] % len(part.kept)] * batch["attention_mask"]
    for student in students:
        if width == teacher.config.hidden_size:
            copy_layers(student, teacher, layers)
        else:
            cut_student(student, teacher, layers, [batch])
    whole, cut_out = students
    rows = cut_out.model.bert.embeddings.word_embeddings.weight
    assert rows.shape == (len(part.kept), width)
    torch.testing.assert_close(rows, whole.model.bert.embeddings.word_embeddings.weight[part.kept])
    needs = Needs(hidden=frozenset({0, 1, 2}), logits=True)
    with torch.no_grad():
        expected, own = whole(batch, needs), cut_out(batch, needs)
    torch.testing.assert_close(own.logits, expected.logits)
    torch.testing.assert_close(own.hidden[0], expected.hidden[0])
    assert sum(p.numel() for p in cut_out.parameters()) == sum(p.numel() for p in whole.parameters()) - width * (
        60 - len(part.kept)
    )


def test_a_checkpoint_with_all_pieces_gives_its_rows(teacher, batch, part: CutVocabulary, tmp_path: Path) -> None:
    whole, own = build(teacher, None), build(teacher, part)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_(std=0.3)
    whole.model.save_pretrained(tmp_path)
    load_body(own, tmp_path)
    expected = whole.model.base_model.state_dict()
    for name, weights in own.model.base_model.state_dict().items():
        rows = expected[name][part.kept] if "word_embeddings" in name else expected[name]
        torch.testing.assert_close(weights, rows, msg=name)
    batch["input_ids"] = part.kept[batch["input_ids"] % len(part.kept)] * batch["attention_mask"]
    needs = Needs(hidden=frozenset({2}))
    with torch.no_grad():
        own.projections.load_state_dict(whole.projections.state_dict())
        torch.testing.assert_close(own(batch, needs).hidden[2], whole(batch, needs).hidden[2])


def test_a_checkpoint_with_some_other_number_of_pieces_is_refused(teacher, part: CutVocabulary, tmp_path: Path) -> None:
    student = build(teacher, None).model
    student.resize_token_embeddings(59)
    student.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has other embeddings than the student"):
        load_body(build(teacher, part), tmp_path)


def test_a_piece_that_was_cut_is_the_unknown_one_to_the_student(teacher, batch, part: CutVocabulary) -> None:
    student = build(teacher, part)
    gone = next(number for number in range(60) if number not in set(part.kept.tolist()))
    for number, own in ((gone, part.tokenizer.unk_token_id), (int(part.kept[7]), 7)):
        batch["input_ids"][0, 1] = number
        mapped = {**batch, "input_ids": part.to_student[batch["input_ids"]]}
        assert mapped["input_ids"][0, 1] == own
        with torch.no_grad():
            expected = capture(student.model, mapped, Needs(logits=True)).logits
            torch.testing.assert_close(student(batch, Needs(logits=True)).logits, expected)


# Runs

CUT = "student.vocabulary={size: 88}"


@pytest.mark.parametrize("tokens", [False, True])
def test_a_run_goes_through_counts_what_is_unknown_and_loads_anywhere(tokens: bool, tmp_path: Path) -> None:
    data = ()
    if tokens:
        rows = [
            json.dumps({"tokens": ["rain", "song", "people", "often", "talk"], "tags": ["B-W", "O", "O", "O", "O"]}),
            json.dumps({"tokens": ["snow", "zq"], "tags": ["B-W", "O"]}),
        ]
        (tmp_path / "rows.jsonl").write_text("\n".join(rows * 16) + "\n")
        files = ", ".join(f"{split}: {tmp_path / 'rows.jsonl'}" for split in ("train", "validation", "test"))
        data = ("data.path=json", f"data.data_files={{{files}}}", "task.type=token_classification")
    size = "student.vocabulary={size: 78, min_count: 2}" if tokens else CUT
    run = tmp_path / "run"
    outcome = succeed(TINY, *FEW_STEPS, *data, size, "augment=null", "--output", run)
    told = json.loads((run / "task" / "result.json").read_text())["vocabulary"]
    assert f"vocabulary: {told['pieces']} of {told['teacher_pieces']} pieces" in outcome.out
    tokenizer = AutoTokenizer.from_pretrained(run / "student")
    assert told["pieces"] == len(tokenizer) == json.loads((run / "student" / "config.json").read_text())["vocab_size"]
    card = (run / "student" / "README.md").read_text()
    assert f"knows {told['pieces']} of its teacher's {told['teacher_pieces']} word pieces" in card
    assert told["validation"]["unknown"] == 0
    assert 0 < told["validation"]["cut"] < told["validation"]["pieces"]
    if tokens:
        return
    model = AutoModelForSequenceClassification.from_pretrained(run / "student").eval()
    summary = json.loads((run / "summary.json").read_text())
    rows = tiny.load()["test"]
    batch = tokenizer(rows["text"][:], padding=True, return_tensors="pt")
    with torch.inference_mode():
        said = model(**batch).logits.argmax(-1)
    right = (said == torch.tensor(rows["label"][:])).float().mean().item()
    assert right == pytest.approx(summary["student"]["metrics"]["accuracy"])
    again = run_tinybert("evaluate", run)
    assert again.status == 0, again.err[-2000:]
    assert json.loads((run / "summary.json").read_text())["student"]["metrics"] == summary["student"]["metrics"]


def test_general_distillation_of_all_pieces_serves_a_cut_vocabulary(tmp_path: Path) -> None:
    general, run = tmp_path / "general", tmp_path / "run"
    succeed(TINY, *FEW_STEPS, "task=null", "augment=null", "--output", general)
    first = f"student.initialization={general / 'general' / 'student'}"
    succeed(TINY, *FEW_STEPS, CUT, first, "general=null", "augment=null", "--output", run)
    assert json.loads((run / "student" / "config.json").read_text())["vocab_size"] == 88

    other_tokenizer().save_pretrained(general / "general" / "student")
    outcome = run_cli(TINY, *FEW_STEPS, CUT, first, "general=null", "--output", tmp_path / "refused")
    assert outcome.status == 2
    assert "has other pieces than the teacher" in " ".join(outcome.err.split())
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (("student.vocabulary={size: 10}",), "student.vocabulary.size: 10 is too few"),
        ((CUT, "student.tokenizer=elsewhere"), "student.tokenizer names another"),
        ((CUT, "student.initialization=elsewhere"), "student.initialization: elsewhere cannot be read"),
        ((CUT, "general.streaming=true", "general.training.max_steps=2"), "set general.streaming=false"),
        (("student.vocabulary={coverage: 2}",), "student.vocabulary.coverage"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(settings: tuple[str, ...], told: str, tmp_path: Path) -> None:
    outcome = run_cli(TINY, *FEW_STEPS, *settings, "--output", tmp_path / "run")
    assert outcome.status == 2
    assert told.lower() in " ".join(outcome.err.split()).lower()
    assert not (tmp_path / "run").exists()


def test_another_kind_of_tokenizer_is_refused() -> None:
    core = Tokenizer(models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>"))
    with pytest.raises(UserError, match="tokenizer is BPE, and only a WordPiece vocabulary can be cut"):
        cut(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>"), {"a": 1})


def test_runs_of_before_the_setting_are_not_refused() -> None:
    """A finished stage is known by what it depends on; a setting that is not set is not among it."""
    started = json.loads((finished_run() / "task" / "started.json").read_text())
    assert "width" in started["inputs"]["student"]
    assert "vocabulary" not in started["inputs"]["student"]
