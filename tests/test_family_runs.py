"""Claims about whole runs where the teacher is no BERT; what each family shows is test_families.py's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from distill import tiny
from tests.builders import FEW_STEPS, TINY, run_cli, succeed

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
PIECES = {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
FAMILIES: dict[str, dict[str, Any]] = {
    "modernbert": {"local_attention": 4},  # a window narrower than the sentences
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
    "roberta": {},
    "megatron-bert": {},
}


def save_teacher(family: str, folder: Path) -> Path:
    """A masked language model of random weights and the toy's tokenizer."""
    tokenizer = tiny.tokenizer()
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **SHAPE, **PIECES, **FAMILIES[family])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_modernbert_teaches_a_bert_through_every_stage(tmp_path: Path) -> None:
    teacher, folder = save_teacher("modernbert", tmp_path / "teacher"), tmp_path / "run"
    settings = [f"teacher.model={teacher}", "student.family=bert", "student.initialization=random"]
    settings += ["task.losses.relations={}", "task.losses.attention.heads=averaged", "student.heads=2"]
    succeed(TINY, *FEW_STEPS, *settings, "general.losses.attention.heads=averaged", "--output", folder)

    student = AutoModelForSequenceClassification.from_pretrained(folder / "student")
    assert type(student).__name__ == "BertForSequenceClassification"
    assert student.config.id2label == {0: "weather", 1: "music"}
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    assert tokenizer.get_vocab() == tiny.tokenizer().get_vocab()
    assert student(**tokenizer("rain and wind", return_tensors="pt")).logits.isfinite().all()
    assert student.config.max_position_embeddings == 64

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("train/attention", "train/relations", "train/hidden", "train/logits")
    logged = {name: [row[name] for row in rows if name in row] for name in names}
    assert all(values and all(0 < value < 1e4 for value in values) for values in logged.values()), logged
    summary = json.loads((folder / "summary.json").read_text())
    assert {"teacher", "student", "undistilled_student", "retention"} <= summary.keys()


def test_content_scores_of_a_deberta_teach_a_deberta(tmp_path: Path) -> None:
    teacher, folder = save_teacher("deberta-v2", tmp_path / "teacher"), tmp_path / "run"
    settings = [f"teacher.model={teacher}", "student.initialization=random", "general=null", "augment=null"]
    succeed(TINY, *FEW_STEPS[:2], *FEW_STEPS[4:], *settings, "evaluate.undistilled=false", "--output", folder)
    student = AutoModelForSequenceClassification.from_pretrained(folder / "student")
    assert type(student).__name__ == "DebertaV2ForSequenceClassification"


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("modernbert", ["student.family=bert"], ("student.initialization", "modernbert", "=random")),
        ("modernbert", [], ("student.initialization", "modernbert", "=random")),
        ("modernbert", ["student.initialization=random"], ()),
        ("roberta", [], ()),  # 62 positions: fewer than a plan's probe of speed would take
        (
            "megatron-bert",
            ["student.initialization=random"],
            ("general.losses.attention", "megatron-bert", "Set general.losses.attention=null"),
        ),
        (
            "megatron-bert",
            ["student.initialization=random", "general=null"],
            ("task.losses.attention", "megatron-bert", "Set task.losses.attention=null"),
        ),
        (
            "megatron-bert",
            ["student.initialization=random", "general.losses.attention=null", "task.losses.attention=null"],
            (),
        ),
    ],
)
def test_what_two_families_cannot_do_is_refused_before_training(
    family: str, settings: list[str], expected: tuple[str, ...], tmp_path: Path
) -> None:
    teacher, folder = save_teacher(family, tmp_path / "teacher"), tmp_path / "run"
    outcome = run_cli(TINY, *FEW_STEPS, f"teacher.model={teacher}", *settings, "--output", folder, "--dry-run")
    assert outcome.status == (2 if expected else 0), outcome.err
    assert all(part in outcome.err for part in expected), outcome.err
    assert not folder.exists()
