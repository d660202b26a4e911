"""Claims about benchmarks/literal.py: it computes what the published code computed, and shares nothing with the library
that is measured against it."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

from benchmarks import literal
from tests.builders import ROOT

FOLDERS = sorted(path.parent for path in (Path(__file__).parent / "reference").glob("*/expected.json"))


def body(folder: Path) -> BertModel:
    model: BertModel = BertModel.from_pretrained(folder, add_pooling_layer=False, attn_implementation="eager")
    return model.eval()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_its_losses_and_gradients_are_the_published_ones(folder: Path) -> None:
    expected = json.loads((folder / "expected.json").read_text())
    batch = {
        name: torch.tensor(expected[name])
        for name in ("input_ids", "attention_mask", "token_type_ids")
        if name in expected
    }
    student, teacher = body(folder / "student"), body(folder / "teacher")
    weights = load_file(folder / "projection.safetensors")
    projection = nn.Linear(weights["weight"].shape[1], weights["weight"].shape[0])
    projection.load_state_dict(weights)
    own = literal.show(student, batch)
    with torch.no_grad():
        theirs = literal.show(teacher, batch)
    attention, hidden = literal.attention_loss(own, theirs), literal.hidden_loss(own, theirs, projection)
    assert attention.item() == pytest.approx(expected["attention_total"], rel=1e-5)
    assert hidden.item() == pytest.approx(expected["hidden_total"], rel=1e-5)
    for temperature in (1, 2):
        logits = (torch.tensor(expected[f"{side}_logits"]) for side in ("student", "teacher"))
        loss = literal.soft_cross_entropy(*logits, temperature)
        assert loss.item() == pytest.approx(expected[f"soft_cross_entropy_t{temperature}"], rel=1e-5)
    (attention + hidden).backward()
    parameters = {f"bert.{name}": p for name, p in student.named_parameters()}
    parameters |= {f"fit_dense.{name}": p for name, p in projection.named_parameters()}
    for name, norm in expected["gradient_norms_of_attention_plus_hidden"].items():
        grad = parameters[name].grad
        assert grad is not None
        assert grad.norm().item() == pytest.approx(norm, rel=1e-4), name


def test_its_logits_are_the_models_own_and_its_steps_learn() -> None:
    def model(layers: int, width: int, seed: int) -> BertForSequenceClassification:
        torch.manual_seed(seed)
        shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 32}
        return BertForSequenceClassification(BertConfig(vocab_size=50, initializer_range=0.3, **shape)).eval()

    student, teacher = model(2, 8, 0), model(4, 16, 1).requires_grad_(False)
    batch = {
        "input_ids": torch.arange(24).view(3, 8),
        "attention_mask": torch.ones(3, 8, dtype=torch.long),
        "token_type_ids": torch.zeros(3, 8, dtype=torch.long),
    }
    batch["attention_mask"][1, 5:] = 0
    torch.testing.assert_close(literal._logits(teacher, literal.show(teacher.bert, batch)), teacher(**batch).logits)
    step = literal.Literal(student, teacher, nn.Linear(8, 16), learning_rate=1e-2)
    for take in (step.intermediate_step, step.logits_step):
        losses = [take(batch) for _ in range(30)]
        assert losses[-1] < losses[0]


def test_it_imports_nothing_of_the_library() -> None:
    tree = ast.parse((ROOT / "benchmarks" / "literal.py").read_text(encoding="utf-8"))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
    }
    assert imported <= {"__future__", "math", "collections", "dataclasses", "torch", "transformers"}
