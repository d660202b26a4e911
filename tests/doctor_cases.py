"""Rows, teachers and runs for the tests of the preflight.
The claims are in test_doctor (the command), test_doctor_teacher, test_doctor_models, test_doctor_rows and
test_doctor_losses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from distill import tiny
from distill.config import load_config
from distill.tasks import TASKS
from pipelines.doctor import Finding, Preflight
from pipelines.pipeline import prepare
from pipelines.run import open_run
from tests.builders import TINY, write_rows

Row = dict[str, Any]
WORDS = ["rain", "snow", "wind", "storm", "song", "piano", "drum", "choir", "people", "often", "talk", "about"]
ROWS = 60


def words(index: int, count: int = 6) -> str:
    """Texts that differ for indices below 12 * 12 * 12; each word is one piece."""
    spelled = [WORDS[index % 12], WORDS[index // 12 % 12], WORDS[index // 144]]
    return " ".join((spelled + ["town"] * count)[:count])


def two_classes(index: int) -> Row:
    """Two thirds of `yes`."""
    return {"text": words(index), "label": "no" if index % 3 == 0 else "yes"}


def splits(folder: Path, make: Callable[[int], Row], **others: Callable[[int], Row]) -> list[str]:
    """Overrides for a data set of ROWS rows a split, no text in two; `others` are splits made in another way."""
    overrides = ["data.path=json"]
    for number, split in enumerate(("train", "validation", "test")):
        rows = [others.get(split, make)(index + number * ROWS) for index in range(ROWS)]
        overrides.append(f"data.data_files.{split}={write_rows(folder / f'{split}.jsonl', rows)}")
    return overrides


def save_teacher(folder: Path, task: str = "single_label_classification", **changes: Any) -> str:
    """A teacher whose head counts as trained, of random weights."""
    pieces = tiny.tokenizer()
    shape = {
        "vocab_size": len(pieces),
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "num_labels": 2,
    }
    config = BertConfig(**{**shape, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        TASKS[task].auto_class.from_config(config).save_pretrained(folder)
    pieces.save_pretrained(folder)
    return str(folder)


def preflight(folder: Path, *overrides: str, ready: bool = False) -> Preflight:
    """Of configs/tiny.yaml; ready: with a teacher that needs no training."""
    given = [f"teacher.model={save_teacher(folder / 'teacher')}", "teacher.training=null"] if ready else []
    alone = ["general=null", "augment=null", "runtime.precision=fp32"]
    config = load_config(TINY, [*alone, *given, *overrides])
    run = open_run(replace(config, output=str(folder / "run")))
    return Preflight(run, prepare(run))


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def one_hot(classes: list[int], size: int = 2) -> list[np.ndarray]:
    return [np.eye(size)[index] for index in classes]


def tagged(index: int) -> Row:
    """Six tokens: two entities of one token each, of different types."""
    tokens = words(index).split()
    return {"tokens": tokens, "tags": ["B-X", "O", "B-Y", "O", "O", "O"]}


def several(index: int) -> Row:
    return {"text": words(index), "label": ["a"] + ["b"] * (index % 2 == 0) + ["c"] * (index % 3 == 0)}


def save_encoder(folder: Path, tokenizer: PreTrainedTokenizerFast | None) -> str:
    """A checkpoint of the shape of configs/tiny.yaml's student."""
    config = BertConfig(
        vocab_size=len(tiny.tokenizer()),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return f"student.initialization={folder}"


def other_tokenizer() -> PreTrainedTokenizerFast:
    """As many pieces; `rain` and `wind` have each other's number."""
    text = tiny.tokenizer().backend_tokenizer.to_str()
    swapped = text.replace('"rain"', '"-"').replace('"wind"', '"rain"').replace('"-"', '"wind"')
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(swapped), mask_token="[MASK]", **names)


def three_names(index: int) -> Row:
    return {"text": words(index), "label": ("bad", "fair", "good")[index % 3]}
