"""Claims about the preflight's checks of tokenizer, layer map and machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from distill import tiny
from pipelines.doctor import Level, models
from tests.doctor_cases import (
    only,
    other_tokenizer,
    preflight,
    save_encoder,
    save_teacher,
)


def test_another_vocabulary_is_an_error_where_features_are_compared(tmp_path: Path) -> None:
    start = save_encoder(tmp_path / "student", other_tokenizer())
    findings = models.check_tokenizer(preflight(tmp_path, start))
    assert [finding.level for finding in findings] == [Level.OK, Level.ERROR]
    assert "2 of 102 pieces" in findings[1].message
    assert "'rain'" in findings[1].message
    assert "student.initialization" in findings[1].remedy
    findings = models.check_tokenizer(preflight(tmp_path, start, "task.intermediate=null"))
    assert [finding.level for finding in findings] == [Level.OK, Level.WARNING]


@pytest.mark.parametrize("tokenizer", [tiny.tokenizer(), None])
def test_the_same_vocabulary_is_fine(tokenizer: PreTrainedTokenizerFast | None, tmp_path: Path) -> None:
    findings = models.check_tokenizer(preflight(tmp_path, save_encoder(tmp_path / "student", tokenizer)))
    assert {finding.level for finding in findings} == {Level.OK}
    assert len(findings) == (1 if tokenizer is None else 2)


def test_many_unused_embeddings_are_noted(tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher", vocab_size=500)
    finding = only(models.check_tokenizer(preflight(tmp_path, f"teacher.model={teacher}", "teacher.training=null")))
    assert finding.level is Level.NOTE
    assert "102 pieces for 500" in finding.message
    assert "tokenizer" in finding.remedy


def test_a_map_without_the_last_teacher_layer_is_noted(tmp_path: Path) -> None:
    finding = only(models.check_layer_map(preflight(tmp_path)))
    assert (finding.level, finding.message) == (Level.OK, "student 1 2 <- teacher 2 4 (of 4)")
    finding = only(models.check_layer_map(preflight(tmp_path, "layer_map.strategy=bottom")))
    assert finding.level is Level.NOTE
    assert "[2, 4]" in finding.remedy


def test_a_precision_slower_than_the_other_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = preflight(tmp_path)
    monkeypatch.setattr(models, "measured_precision", lambda device: "fp32")
    finding = only(models.check_environment(looked_at))
    assert finding.level is Level.OK
    assert f"torch {torch.__version__}" in finding.message
    monkeypatch.setattr(models, "measured_precision", lambda device: "bf16")
    finding = only(models.check_environment(looked_at))
    assert finding.level is Level.NOTE
    assert "runtime.precision=bf16" in finding.remedy


def test_too_little_memory_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = preflight(tmp_path)
    monkeypatch.setattr(models, "parameters", lambda config: 10**8)

    class Free:
        available = 100 * 10**9

    monkeypatch.setattr(models.psutil, "virtual_memory", lambda: Free)
    finding = only(models.check_memory(looked_at))
    assert finding.level is Level.OK
    assert "2,000 MB" in finding.message  # 16 bytes a student's parameter, 4 a teacher's
    Free.available = 10**9
    finding = only(models.check_memory(looked_at))
    assert finding.level is Level.WARNING
    assert "student.layers" in finding.remedy
