"""Claims about the phase on logits that keeps the terms on layers: it minimises both, alone or after the other phase,
and what compares layers is refused there as elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill.config import parse_config
from pipelines import task as task_stage
from tests.builders import FEW_STEPS, TINY, run_cli, succeed
from tests.doctor_cases import other_tokenizer

LAYERS, PREDICTIONS = {"embedding", "attention", "hidden"}, {"logits"}
SHORT = (TINY, *FEW_STEPS, "general=null", "augment=null", "task.joint=true")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"logits": LAYERS | PREDICTIONS}),
        ({"joint": False}, {"intermediate": LAYERS, "logits": PREDICTIONS}),
        ({"joint": True}, {"intermediate": LAYERS, "logits": LAYERS | PREDICTIONS}),
        ({"joint": True, "intermediate": None}, {"logits": LAYERS | PREDICTIONS}),
        ({"joint": True, "logits": None}, {"intermediate": LAYERS}),
        ({"intermediate": None}, {"logits": PREDICTIONS}),
    ],
)
def test_each_phase_has_its_terms(settings: dict[str, Any], expected: dict[str, set[str]]) -> None:
    task = parse_config({"task": settings}).task
    assert task is not None
    assert {phase: set(terms) for phase, terms in task.terms().items()} == expected
    assert task.compares_layers == any(terms & LAYERS for terms in expected.values())


@pytest.mark.parametrize("vocabulary", [(), ("student.vocabulary={size: 90}",)])
@pytest.mark.parametrize("alone", [(), ("task.intermediate=null",)])
def test_layers_and_logits_are_learned_together(
    alone: tuple[str, ...], vocabulary: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The total is the sum that is logged in parts, and the projections, which the logits do not reach, learn."""
    moved: list[float] = []
    fit = task_stage.fit

    def watched(student: Any, *arguments: Any, **options: Any) -> Any:
        before = {name: value.clone() for name, value in student.projections.state_dict().items()}
        result = fit(student, *arguments, **options)
        after = student.projections.state_dict()
        if options["name"] == "task.logits":
            moved.extend((after[name] - value).abs().max().item() for name, value in before.items())
        return result

    monkeypatch.setattr(task_stage, "fit", watched)
    run = tmp_path / "run"
    succeed(*SHORT, *alone, *vocabulary, "--output", run)
    assert moved
    assert min(moved) > 0
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in logged if row.get("stage") == "task.logits" and "train/loss" in row]
    assert len(steps) == 6, logged[-5:]
    for row in steps:
        parts = [row[f"train/{name}"] for name in LAYERS | PREDICTIONS]
        assert row["train/loss"] == pytest.approx(sum(parts), rel=1e-4)
    weights = load_file(run / "student" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (("task.losses={embedding: null, attention: null, hidden: null}",), "task.joint=false"),
        (("student.initialization=random", "student.tokenizer={tokenizer}"), "set task.joint=false"),
    ],
)
def test_what_cannot_be_compared_is_refused(settings: tuple[str, ...], told: str, tmp_path: Path) -> None:
    other_tokenizer().save_pretrained(tmp_path / "tokenizer")
    given = [one.format(tokenizer=tmp_path / "tokenizer") if "{tokenizer}" in one else one for one in settings]
    outcome = run_cli(*SHORT, "task.intermediate=null", *given, "--output", tmp_path / "run")
    assert outcome.status == 2
    assert told in outcome.err
    assert not (tmp_path / "run").exists()
