"""Claims about a student that reads other pieces than its teacher: it learns the teacher's logits of the same texts,
and whatever would compare pieces is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, RobertaConfig, RobertaModel

from distill import tiny
from distill.teachers import open_tokenizer, vocabulary_hash
from pipelines import task as task_stage
from tests.builders import FEW_STEPS, TINY, run_cli, succeed
from tests.doctor_cases import other_tokenizer

LOGITS_ALONE = ("general=null", "task.intermediate=null", "student.initialization=random")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's tokenizer with two words' numbers exchanged, alone in a folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    other_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("augmented", [True, False])
def test_the_student_learns_what_the_teacher_says_of_the_same_texts(
    augmented: bool, pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Dataset] = []
    fit = task_stage.fit

    def watched(*arguments: Any, **options: Any) -> Any:
        seen.append(arguments[3].dataset)
        return fit(*arguments, **options)

    monkeypatch.setattr(task_stage, "fit", watched)
    kept = f"runtime.logits_cache={tmp_path / 'logits'}"
    run = tmp_path / "run"
    phase = () if augmented else ("task.augmented_logits=false", "augment=null")
    outcome = succeed(TINY, *FEW_STEPS, *LOGITS_ALONE, *phase, kept, f"student.tokenizer={pieces}", "--output", run)
    assert "only logits are distilled" in " ".join(outcome.out.split())
    (rows,) = seen
    teacher = AutoModelForSequenceClassification.from_pretrained(run / "teacher" / "model").eval()
    reads, own = (
        AutoTokenizer.from_pretrained(run / "student"),
        AutoTokenizer.from_pretrained(run / "teacher" / "model"),
    )
    assert vocabulary_hash(reads) == vocabulary_hash(other_tokenizer())
    assert vocabulary_hash(own) == vocabulary_hash(tiny.tokenizer())
    differ = 0
    for row in rows.select(range(0, len(rows), 9)):
        words = reads.convert_ids_to_tokens(row["input_ids"])
        ids = own.convert_tokens_to_ids(words)
        differ += ids != row["input_ids"]
        with torch.inference_mode():
            expected = teacher(input_ids=torch.tensor([ids])).logits[0]
        torch.testing.assert_close(torch.tensor(row["teacher_logits"]), expected, rtol=1e-4, atol=1e-4)
    assert differ, "no text with an exchanged word was looked at"


def test_the_teacher_is_trained_and_measured_on_its_own_pieces(pieces: Path, tmp_path: Path) -> None:
    figures = []
    for name, extra in (("same", ()), ("other", (f"student.tokenizer={pieces}",))):
        succeed(TINY, *FEW_STEPS, *LOGITS_ALONE, "augment=null", *extra, "--output", tmp_path / name)
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        figures.append(summary["teacher"]["metrics"])
    assert figures[0] == figures[1]


@pytest.mark.parametrize(
    ("without", "told"),
    [
        ("general=null", "set general=null"),
        ("task.intermediate=null", "set task.intermediate=null"),
        ("student.initialization=random", "set student.initialization=random"),
    ],
)
def test_what_compares_pieces_is_refused_with_what_to_set(
    without: str, told: str, pieces: Path, tmp_path: Path
) -> None:
    rest = [setting for setting in LOGITS_ALONE if setting != without]
    outcome = run_cli(TINY, *FEW_STEPS, *rest, f"student.tokenizer={pieces}", "--output", tmp_path / "run")
    assert outcome.status == 2
    assert "student.tokenizer" in outcome.err
    assert told in outcome.err
    assert sum(f"set {setting}" in outcome.err for setting in LOGITS_ALONE) == 1
    assert not (tmp_path / "run").exists()


def test_a_noisy_teacher_is_refused(pieces: Path, tmp_path: Path) -> None:
    settings = (*LOGITS_ALONE, "teacher.dropout=true", f"student.tokenizer={pieces}")
    outcome = run_cli(TINY, *FEW_STEPS, *settings, "--output", tmp_path / "run")
    assert outcome.status == 2
    assert "set teacher.dropout=false" in outcome.err


def test_the_same_vocabulary_in_another_folder_is_the_teachers(tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "pieces")
    outcome = succeed(
        TINY,
        *FEW_STEPS,
        f"student.tokenizer={tmp_path / 'pieces'}",
        "--output",
        tmp_path / "run",
        "--stages",
        "general",
    )
    assert "only logits" not in outcome.out


def test_a_folder_with_a_config_says_what_student_reads_it(tmp_path: Path) -> None:
    pieces = other_tokenizer()
    config = RobertaConfig(vocab_size=len(pieces) + 3, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    RobertaModel(config).save_pretrained(tmp_path / "roberta")
    pieces.save_pretrained(tmp_path / "roberta")
    pieces.save_pretrained(tmp_path / "alone")
    assert isinstance(open_tokenizer(str(tmp_path / "roberta")).config, RobertaConfig)
    alone = open_tokenizer(str(tmp_path / "alone")).config
    assert isinstance(alone, BertConfig)
    assert (alone.vocab_size, alone.pad_token_id) == (len(pieces), pieces.pad_token_id)


@pytest.mark.parametrize("make", [lambda folder: folder.mkdir(), lambda folder: None])
def test_a_folder_without_a_tokenizer_is_refused(make: Any, tmp_path: Path) -> None:
    make(tmp_path / "nothing")
    named = f"student.tokenizer={tmp_path / 'nothing'}"
    outcome = run_cli(TINY, *FEW_STEPS, *LOGITS_ALONE, named, "--output", tmp_path / "run")
    assert outcome.status == 2
    assert "student.tokenizer" in outcome.err
    assert not (tmp_path / "run").exists()
