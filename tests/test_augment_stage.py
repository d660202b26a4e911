"""Claims about augmentation inside a run: a masked LM adapted for it, the teacher's filter, what is refused."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

from distill import tiny
from distill.activations import Needs
from distill.augmentation import AugmentOptions, find_masked_lm
from distill.augmentation.adaptation import MaskedCollator, MaskedLearner, mask_sequences, masked_accuracy, repeat
from distill.augmentation.filtering import TeacherFilter
from distill.data import DataOptions, load_task_data
from distill.interruption import Interruption
from distill.losses import IGNORED
from distill.presets import REFERENCE_COPIES
from distill.tasks import TASKS
from tests.builders import FEW_STEPS, ROOT, TINY, Outcome, run_cli, succeed, write_rows
from tests.conftest import BuildModel

AUGMENT_ONLY = (*FEW_STEPS, "--stages", "teacher,masked_lm,augment")


@pytest.fixture(scope="module")
def headless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy teacher without its masked-LM head."""
    folder = tmp_path_factory.mktemp("headless")
    BertModel.from_pretrained(tiny.teacher_folder()).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    assert find_masked_lm(str(folder)) is None
    return folder


def _result(run: Path, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / stage / "result.json").read_text())
    return found


ADAPT = "teacher.adapt_masked_lm={max_steps: 60, batch_size: 16, max_length: 32, learning_rate: 5e-3}"


@pytest.fixture(scope="module")
def adapted(headless: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    folder = tmp_path_factory.mktemp("adapted")
    file = write_rows(folder / "corpus.jsonl", [{"text": " ".join(["rain", "wind", "song"] * 8)}] * 60)
    corpus = ["general.corpus.path=json", f"general.corpus.data_files={file}"]
    given = [f"teacher.model={headless}", *corpus, ADAPT, "--output", folder / "run"]
    return folder / "run", succeed(TINY, *AUGMENT_ONLY, *given)


def test_a_teacher_without_a_head_is_given_one_that_augment_takes_candidates_from(
    adapted: tuple[Path, Outcome],
) -> None:
    run, outcome = adapted
    figures = _result(run, "masked_lm")
    assert figures["steps"] == 60
    before, after = (figures["masked_accuracy"][when] for when in ("before", "after"))
    # Three words occur: a head of random weights finds hardly any of them, one that has learnt which, a third.
    assert before < 0.1
    assert after > 0.25
    assert f"{before:.1%} of the masked pieces were predicted before, {after:.1%} after" in outcome.out
    assert find_masked_lm(str(run / "masked_lm" / "model")) is not None
    # The toy's config has no vectors, so that all candidates are the masked LM's.
    assert _result(run, "augment")["kept"] > 0
    assert not list(run.rglob("checkpoint-*"))


def test_adapting_is_planned_skipped_and_redone_like_a_stage(adapted: tuple[Path, Outcome], tmp_path: Path) -> None:
    run = shutil.copytree(adapted[0], tmp_path / "run")
    again = succeed(run / "config.yaml", *AUGMENT_ONLY[-2:], "--output", run)
    for stage in ("teacher", "masked_lm", "augment"):
        assert f"{stage}: done before, skipped" in again.out
    redone = succeed(run / "config.yaml", *AUGMENT_ONLY[-2:], "--output", run, "--redo", "masked_lm", "--dry-run")
    plan = [line.split("│")[1].strip() for line in redone.out.splitlines() if line.count("│") > 2]
    assert "masked_lm" in plan
    assert "done before" in next(line for line in redone.out.splitlines() if "│ teacher" in line)
    assert "done before" not in next(line for line in redone.out.splitlines() if "│ augment" in line)
    changed = run_cli(run / "config.yaml", "teacher.adapt_masked_lm.max_steps=9", *AUGMENT_ONLY[-2:], "--output", run)
    assert changed.status == 2
    assert "teacher.adapt_masked_lm.max_steps: 60 -> 9" in changed.err


def test_adapting_that_is_stopped_goes_on_to_the_same_masked_lm(adapted: tuple[Path, Outcome], tmp_path: Path) -> None:
    class StopsAfterForty(Interruption):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.asked = 0

        def requested(self) -> int:
            self.asked += 1
            return signal.SIGTERM if self.asked > 40 else 0

    run = shutil.copytree(adapted[0], tmp_path / "run")
    shutil.rmtree(run / "masked_lm")
    statuses = []
    with mock.patch("pipelines.run.Interruption", StopsAfterForty):
        while not statuses or statuses[-1] == 143:
            outcome = run_cli(run / "config.yaml", "--stages", "masked_lm", "--output", run)
            statuses.append(outcome.status)
    assert statuses == [143, 0], outcome.err[-3000:]
    weights = [load_file(folder / "masked_lm" / "model" / "model.safetensors") for folder in (run, adapted[0])]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert _result(run, "masked_lm")["masked_accuracy"] == _result(adapted[0], "masked_lm")["masked_accuracy"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_corpus_is_read_where_there_is_one(streaming: bool, headless: Path, tmp_path: Path) -> None:
    words = ["rain", "wind", "song", "piano"]
    file = write_rows(tmp_path / "corpus.jsonl", [{"text": " ".join(words * 5)} for _ in range(20)])
    corpus = ["general.corpus.path=json", f"general.corpus.data_files={file}", f"general.streaming={streaming}"]
    steps = "teacher.adapt_masked_lm={max_steps: 2, batch_size: 4, max_length: 32}"
    succeed(TINY, *AUGMENT_ONLY, f"teacher.model={headless}", *corpus, steps, "--output", tmp_path / "run")
    # 20 documents of 20 words and a border each, 30 of them in a sequence: 14 sequences.
    assert _result(tmp_path / "run", "masked_lm")["held_out_sequences"] == 1


def test_without_a_head_the_log_says_that_vectors_are_alone(headless: Path, tmp_path: Path) -> None:
    lines = [f"{word} {' '.join(map(str, row))}\n" for word, row in zip(["rain", "wind"], np.eye(2), strict=True)]
    (tmp_path / "vectors.txt").write_text("".join(lines))
    vectors = f"augment.vectors={tmp_path / 'vectors.txt'}"
    outcome = succeed(TINY, *AUGMENT_ONLY, f"teacher.model={headless}", vectors, "--output", tmp_path / "run")
    assert "candidates come from vectors alone" in outcome.out
    assert "teacher.adapt_masked_lm" in outcome.out


@pytest.fixture(scope="module")
def unfiltered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("unfiltered") / "run"
    learnt = "teacher.training={max_steps: 40, batch_size: 16, learning_rate: 3e-3}"
    succeed(TINY, *AUGMENT_ONLY, learnt, "--output", run)
    return run


@pytest.mark.parametrize("choice", ["same_label", "confident"])
def test_the_fine_tuned_teacher_filters_and_the_counts_are_kept_and_told(
    choice: str, unfiltered: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(unfiltered, tmp_path / "run")
    teacher = AutoModelForSequenceClassification.from_pretrained(run / "teacher" / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "teacher" / "model")
    sources = load_task_data(DataOptions(path="tiny"), TASKS["single_label_classification"], seed=42).splits["train"]

    def shares(text: str) -> torch.Tensor:
        with torch.no_grad():
            return teacher(**tokenizer(text, truncation=True, max_length=32, return_tensors="pt")).logits[0].softmax(-1)

    made = _augmented(unfiltered, tmp_path)
    copies = [shares(row["text"]) for row in made]
    # The widest gap in the middle, so that rounding decides nothing.
    certain = np.sort([float(copy.max()) for copy in copies])[len(made) // 4 : -len(made) // 4]
    widest = int(np.diff(certain).argmax())
    least = float(certain[widest : widest + 2].mean())
    stays = [
        bool(copy.argmax() == shares(sources[row["source_row"]]["text"]).argmax())
        if choice == "same_label"
        else float(copy.max()) >= least
        for row, copy in zip(made, copies, strict=True)
    ]
    expected = [row for row, is_kept in zip(made, stays, strict=True) if is_kept]

    options = [f"augment.filter={choice}", f"augment.filter_confidence={least}"]
    outcome = succeed(run / "config.yaml", *options, *AUGMENT_ONLY[-2:], "--output", run, "--redo", "augment")
    assert "teacher: done before, skipped" in outcome.out
    assert _augmented(run, tmp_path) == expected
    counts = _result(run, "augment")
    assert (counts["kept"], counts["filtered"]) == (len(expected), len(made) - len(expected))
    assert f"({choice}) kept {len(expected):,} of {len(made):,} copies" in outcome.out


def test_a_filter_that_keeps_nothing_leaves_the_original_rows(unfiltered: Path, tmp_path: Path) -> None:
    run = shutil.copytree(unfiltered, tmp_path / "run")
    options = ["augment.filter=confident", "augment.filter_confidence=1", "task.intermediate.max_steps=1"]
    steps = ["general=null", "task.logits=null", "--stages", "augment,task"]
    succeed(run / "config.yaml", *options, *steps, "--output", run, "--redo", "augment")
    assert _result(run, "augment")["kept"] == 0
    assert _result(run, "task")["training_rows"] == _result(run, "augment")["rows"]


def _augmented(run: Path, cache: Path) -> list[dict[str, Any]]:
    files = [str(path) for path in sorted((run / "augment" / "data").glob("*.parquet"))]
    return list(Dataset.from_parquet(files, cache_dir=str(cache / "cache")))


def test_a_filtered_set_is_made_anew_when_the_teacher_is(tmp_path: Path) -> None:
    filtered = (*AUGMENT_ONLY, "augment.filter=same_label", "--output", tmp_path / "run")
    succeed(TINY, *filtered)
    outcome = succeed(TINY, *filtered, "--redo", "teacher")
    assert "augment: done before" not in outcome.out


MISTAKES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "adapted for nothing": (["augment=null", ADAPT], ("teacher.adapt_masked_lm", "augment", "off")),
    "two masked LMs": (["augment.masked_lm=tiny-random", ADAPT], ("teacher.adapt_masked_lm", "augment.masked_lm")),
    "longer than the teacher": (["teacher.adapt_masked_lm={}"], ("teacher.adapt_masked_lm.max_length", "128", "64")),
    "filter of numbers": (["task.type=regression", "augment.filter=same_label"], ("augment.filter", "regression")),
    "unknown filter": (["augment.filter=best"], ("augment.filter", "'best'", "same_label")),
    "no confidence": (["augment.filter_confidence=0"], ("augment.filter_confidence", "greater than 0")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_before_anything_is_written(mistake: str, tmp_path: Path) -> None:
    overrides, expected = MISTAKES[mistake]
    outcome = run_cli(TINY, *FEW_STEPS, *overrides, "--output", tmp_path / "run")
    assert outcome.status == 2, outcome.err[-2000:]
    for part in expected:
        assert part in outcome.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("task", ["token_classification", "question_answering"])
def test_a_filter_is_refused_where_labels_are_not_of_whole_texts(task: str, tmp_path: Path) -> None:
    row = {"tokens": ["rain", "wind"], "tags": ["O", "B-X"]}
    if task == "question_answering":
        row = {"id": "1", "question": "rain", "context": "wind", "answers": {"text": ["wind"], "answer_start": [0]}}  # type: ignore[dict-item]
    file = write_rows(tmp_path / "rows.jsonl", [row] * 40)
    data = ["data.path=json", f"data.data_files={file}", f"task.type={task}", "augment.filter=confident"]
    outcome = run_cli(TINY, *FEW_STEPS, *data, "--output", tmp_path / "run")
    assert outcome.status == 2
    assert f"augment.filter: it compares the labels of whole texts, but task.type is {task}" in outcome.err


@pytest.mark.parametrize("name", ["sst2", "mrpc", "stsb"])
def test_the_configs_copies_are_the_published_ones(name: str) -> None:
    config = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    assert config["augment"]["copies"] == REFERENCE_COPIES[name]


sequences_drawn = st.lists(st.lists(st.integers(5, 40), min_size=1, max_size=30), min_size=1, max_size=6)


@settings(deadline=None, max_examples=25)
@given(bodies=sequences_drawn, share=st.floats(0.01, 0.99), seed=st.integers(0, 2**32))
def test_masks_fall_on_a_share_of_the_pieces_and_never_on_special_ones(
    bodies: list[list[int]], share: float, seed: int
) -> None:
    tokenizer = tiny.tokenizer()
    rows = [[tokenizer.cls_token_id, *body, tokenizer.sep_token_id] for body in bodies]
    source = Dataset.from_dict({"input_ids": rows, "length": list(map(len, rows))})
    masked = mask_sequences(source, tokenizer, share, seed)
    for before, after, labels in zip(rows, masked["input_ids"], masked["labels"], strict=True):
        hidden = [place for place, label in enumerate(labels) if label != IGNORED]
        assert len(hidden) == max(1, round(share * (len(before) - 2)))
        assert {0, len(before) - 1}.isdisjoint(hidden)
        assert [labels[place] for place in hidden] == [before[place] for place in hidden]
        expected = [tokenizer.mask_token_id if place in hidden else piece for place, piece in enumerate(before)]
        assert after == expected


def test_every_repetition_is_masked_in_its_own_way() -> None:
    rows = Dataset.from_dict({"input_ids": [[2, *range(5, 35), 3]], "length": [32]})
    masked = mask_sequences(repeat(rows, 3), tiny.tokenizer(), 0.15, seed=0)
    assert len({tuple(ids) for ids in masked["input_ids"]}) == 3


def test_accuracy_and_logits_are_those_of_a_plain_forward(build_model: BuildModel) -> None:
    tokenizer = tiny.tokenizer()
    model = build_model("bert", AutoModelForMaskedLM, vocab_size=len(tokenizer))
    draw = np.random.default_rng(0)
    rows = [[2, *draw.integers(5, len(tokenizer), size=size).tolist(), 3] for size in (4, 17, 9, 30, 2)]
    source = Dataset.from_dict({"input_ids": rows, "length": list(map(len, rows))})
    masked = mask_sequences(source, tokenizer, 0.5, seed=1)
    learner, collator = MaskedLearner(model), MaskedCollator(tokenizer)
    batch = collator(masked[:], [0.2] * 5)
    with torch.no_grad():
        logits = learner(batch, Needs(logits=True)).logits
        assert logits is not None
        hits = total = 0
        for row, (ids, labels) in enumerate(zip(masked["input_ids"], masked["labels"], strict=True)):
            alone = model(input_ids=torch.tensor([ids])).logits[0]
            places = [place for place, label in enumerate(labels) if label != IGNORED]
            torch.testing.assert_close(logits[row, : len(places)], alone[places], atol=1e-5, rtol=0)
            hits += sum(int(alone[place].argmax()) == labels[place] for place in places)
            total += len(places)
    assert masked_accuracy(learner, masked, collator, Accelerator(), 2) == pytest.approx(hits / total)


class CountingTeacher(nn.Module):
    """logits[c] = how often the words of class c stand in the text, less one half; so labels can be told by hand."""

    device = torch.device("cpu")
    config = BertConfig()
    words = (("rain", "snow"), ("song", "guitar"), ("walk", "town"))

    def forward(self, input_ids: torch.Tensor, **others: torch.Tensor) -> dict[str, torch.Tensor]:
        tokenizer = tiny.tokenizer()
        pieces = [torch.tensor(tokenizer.convert_tokens_to_ids(list(words))) for words in self.words]
        counts = [torch.isin(input_ids, of_class).sum(-1).float() - 0.5 for of_class in pieces]
        return {"logits": torch.stack(counts, dim=-1)}


def _kept(sources: list[str], copies: list[tuple[int, str]], task: str, choice: str, least: float = 0.9) -> list[bool]:
    label = [1.0, 0.0, 0.0] if task == "multi_label_classification" else 0
    rows = Dataset.from_dict({"text": sources, "label": [label] * len(sources)})
    options = AugmentOptions(filter=choice, filter_confidence=least)  # type: ignore[arg-type]
    teacher: Any = CountingTeacher()
    keep = TeacherFilter(teacher, tiny.tokenizer(), TASKS[task], rows, options, max_length=32, batch_size=2)
    return keep([{"text": text, "label": label, "source_row": number} for number, text in copies])


def test_a_copy_stays_where_the_teacher_labels_it_as_its_source() -> None:
    copies = [(0, "snow and song and snow"), (0, "a song"), (2, "walk near our town"), (1, "guitar"), (2, "rain")]
    kept = _kept(["rain and snow", "a song", "our town"], copies, "single_label_classification", "same_label")
    assert kept == [True, False, True, True, False]


def test_a_copy_stays_where_the_teacher_is_sure() -> None:
    # Softmax of (n, 0, 0) more than the others: 1 / (1 + 2 exp(-n)) is 0.58 for one word, 0.79 for two, 0.91 for three.
    copies = [(0, "rain"), (0, "rain snow"), (0, "song rain snow rain snow"), (0, "song guitar song")]
    kept = _kept(["rain"], copies, "single_label_classification", "confident", 0.85)
    assert kept == [False, False, True, True]


def test_of_several_labels_all_must_agree() -> None:
    copies = [(0, "guitar near the snow"), (0, "rain"), (0, "song"), (1, "people"), (1, "town")]
    assert _kept(["rain song", "talk"], copies, "multi_label_classification", "same_label") == [
        True,
        False,
        False,
        True,
        False,
    ]


def test_of_several_labels_the_least_certain_counts() -> None:
    # An absent label has the logit -0.5, probability 0.62; words that stand there once 0.62, twice 0.82.
    every = "rain snow song guitar walk town"
    copies = [(0, every), (0, "rain song town"), (0, f"{every} rain"), (0, "rain snow")]
    kept = _kept(["rain"], copies, "multi_label_classification", "confident", 0.8)
    assert kept == [True, False, True, False]
