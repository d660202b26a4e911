"""The claim that sets of many classes train: 77 intents, each told by its words, are learnt and distilled."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import AutoConfig

from distill import tiny
from tests.builders import TINY, succeed, write_rows

KNOWN = sorted(word for word in tiny.tokenizer().get_vocab() if word.isalpha())


def rows(copies: int) -> list[dict[str, str]]:
    """A class for each known word, and more for two of them side by side."""
    texts = [f"{word} {word}" for word in KNOWN] + [f"{one} {other}" for one, other in pairwise(KNOWN)]
    return [{"text": text, "label": f"intent {index:02d}"} for index, text in enumerate(texts[:77])] * copies


@pytest.mark.slow
def test_77_classes_are_learnt_and_distilled(tmp_path: Path) -> None:
    assert len({row["text"] for row in rows(1)}) == 77
    files = [
        f"data.data_files.{split}={write_rows(tmp_path / f'{split}.jsonl', rows(copies))}"
        for split, copies in (("train", 12), ("validation", 1), ("test", 1))
    ]
    run = tmp_path / "run"
    succeed(
        TINY,
        "data.path=json",
        *files,
        "runtime.precision=fp32",
        "general=null",
        "augment=null",
        "evaluate.undistilled=false",
        "teacher.training={epochs: 20, batch_size: 32, learning_rate: 3e-3}",
        "task.intermediate={epochs: 4, batch_size: 32, learning_rate: 3e-3}",
        "task.logits={epochs: 10, batch_size: 32, learning_rate: 3e-3}",
        "--output",
        run,
    )
    summary = json.loads((run / "summary.json").read_text())
    assert summary["teacher"]["metrics"]["accuracy"] > 0.6
    assert summary["student"]["metrics"]["accuracy"] > 0.6
    names = AutoConfig.from_pretrained(run / "student").id2label
    assert [names[index] for index in range(77)] == [f"intent {index:02d}" for index in range(77)]
