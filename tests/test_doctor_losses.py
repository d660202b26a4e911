"""Claims about the preflight's check of the losses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from pipelines.doctor import Finding, Level, Preflight, losses
from tests.doctor_cases import (
    preflight,
)


def shares(findings: list[Finding], phase: str) -> dict[str, float]:
    """Shares of the gradient by term, in percent."""
    parts = next(finding.message for finding in findings if finding.subject == f"losses {phase}").split(": value")[0]
    return {part.split()[0]: float(part.split("(")[1].rstrip("%)")) for part in parts.split(", ")}


def test_an_inert_term_is_named_and_the_weight_told_gives_it_a_tenth(tmp_path: Path) -> None:
    looked_at = preflight(tmp_path, "task.losses.embedding.weight=1e-4", "task.losses.attention=null")
    findings = losses.check_losses(looked_at)
    inert = [finding for finding in findings if finding.level is Level.WARNING]
    assert [finding.message.split()[0] for finding in inert] == ["embedding"]
    assert "task.intermediate.balance=gradient" in inert[0].remedy
    told = inert[0].remedy.split()[0]
    assert told.startswith("task.losses.embedding.weight=")
    findings = losses.check_losses(preflight(tmp_path, told, "task.losses.attention=null"))
    assert {finding.level for finding in findings} == {Level.OK}
    assert shares(findings, "task.intermediate")["embedding"] == pytest.approx(10, abs=0.5)


def test_balanced_terms_are_not_inert(tmp_path: Path) -> None:
    balanced = preflight(tmp_path, "task.intermediate.balance=gradient", "task.losses.hidden.weight=2")
    findings = losses.check_losses(balanced)
    assert {finding.level for finding in findings} == {Level.OK}
    assert shares(findings, "task.intermediate") == {"embedding": 25, "attention": 25, "hidden": 50}


def test_a_term_of_weight_0_is_to_be_switched_off(tmp_path: Path) -> None:
    findings = losses.check_losses(preflight(tmp_path, "task.losses.hidden.weight=0", "task.losses.attention=null"))
    assert findings[1].level is Level.WARNING
    assert "task.losses.hidden=null" in findings[1].remedy


def test_every_phase_that_can_be_is_measured(tmp_path: Path) -> None:
    def measured(looked_at: Preflight) -> list[str]:
        return [f.subject.removeprefix("losses ") for f in losses.check_losses(looked_at) if f.level is Level.OK]

    general = "general={corpus: {path: tiny}, max_length: 32}"
    assert measured(preflight(tmp_path, general)) == ["general", "task.intermediate"]
    assert measured(preflight(tmp_path, general, ready=True)) == ["general", "task.intermediate", "task.logits"]
    assert measured(preflight(tmp_path, "task.intermediate=null", ready=True)) == ["task.logits"]
    assert measured(preflight(tmp_path, general, "task=null")) == ["general"]


def test_a_loss_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    looked_at = preflight(tmp_path, "student.initialization=random", ready=True)
    teacher: PreTrainedModel = looked_at.teacher
    with torch.no_grad():
        teacher.base_model.encoder.layer[0].output.dense.weight.fill_(math.nan)
    finding = losses.check_losses(looked_at)[0]
    assert finding.level is Level.ERROR
    assert "hidden is nan" in finding.message
    assert "float32" in finding.remedy
