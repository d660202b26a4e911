"""Claims about the teacher's states that are computed once: they are what the teacher shows of each row, they are found
again and never taken for another teacher's, other rows' or other layers', and training on them is training on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from safetensors.torch import load_file
from transformers import PreTrainedModel

from distill import teacher_states as module
from distill import tiny, training
from distill.activations import Needs, capture
from distill.attention import show_attention
from distill.data import Batches, Collator
from distill.layer_map import LayerMap
from distill.losses import AttentionLoss, EmbeddingLoss, HiddenLoss, Logits, LossTerm, Match, RelationLoss
from distill.objective import Objective
from distill.teacher_states import TeacherStates, state_layout, teacher_states
from tests.builders import FEW_STEPS, TINY, encoded_rows, run_cli, succeed

LENGTHS = [5, 12, 3, 9, 16, 7, 4]
NEEDS = Needs(hidden=frozenset({0, 2}), attention=frozenset({1, 4}))


def computed(
    folder: Path, teacher: PreTrainedModel, needs: Needs = NEEDS, rows: Dataset | None = None
) -> TeacherStates:
    rows = encoded_rows(LENGTHS) if rows is None else rows
    collator = Collator(tiny.tokenizer(), None)
    layout = state_layout(teacher, rows, collator, needs)
    return teacher_states(teacher, rows, collator, Accelerator(cpu=True), needs, layout, folder=folder)


@pytest.fixture
def shown(build_model) -> PreTrainedModel:
    model: PreTrainedModel = build_model("bert")
    show_attention(model)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("family", ["bert", "mobilebert", "modernbert"])
@torch.no_grad()
def test_each_row_has_what_the_teacher_shows_of_it_alone(
    family: str, values: bool, build_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_block_rows", lambda *given: 3)
    monkeypatch.setattr(module, "BATCH_TOKENS", 32)
    model = build_model(family).eval()
    show_attention(model)
    rows = encoded_rows(LENGTHS)
    asked = [4, 0, 6, 2]
    needs = NEEDS | Needs(values=values)
    states = computed(tmp_path, model, needs)
    found = states.activations({"teacher_states": states.padded(asked, 16)})
    for place, row in enumerate(asked):
        alone = capture(model, {"input_ids": torch.tensor([rows[row]["input_ids"]])}, needs)
        n = LENGTHS[row]
        for layer in (0, 2):
            torch.testing.assert_close(found.hidden[layer][place, :n], alone.hidden[layer][0], rtol=1e-4, atol=1e-5)
            assert not found.hidden[layer][place, n:].any()
        for layer in (1, 4):
            got, own = found.attention[layer], alone.attention[layer]
            torch.testing.assert_close(got.query[place, :, :n], own.query[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(got.key[place, :, :n], own.key[0], rtol=1e-4, atol=1e-5)
            assert (got.scaling, got.window) == (own.scaling, own.window)
            if values:
                torch.testing.assert_close(got.value[place, :, :n], own.value[0], rtol=1e-4, atol=1e-5)
            else:
                assert not got.value.numel()


TERMS: dict[str, LossTerm] = {
    "embedding": EmbeddingLoss(),
    "attention": AttentionLoss(),
    "averaged": AttentionLoss(heads="averaged"),
    "relations": RelationLoss(),
    "hidden": HiddenLoss(),
}


@pytest.mark.parametrize("term", TERMS)
def test_the_loss_on_them_is_the_loss_on_the_teacher(term: str, shown, build_model, tmp_path: Path) -> None:
    student = build_model("bert", seed=1).eval()
    show_attention(student)
    layers = LayerMap(((1, 2), (2, 4)), ((1, 2), (2, 4)), student_layers=2, teacher_layers=4)
    objective = Objective({term: TERMS[term]}, Match(layers, Logits.CLASSES))
    rows = encoded_rows(LENGTHS)
    states = computed(tmp_path, shown, objective.teacher_needs)
    values = []
    for teacher, kept in ((shown, None), (states, states)):
        batches = Batches(rows, Collator(tiny.tokenizer(), None), batch_size=4, seed=0, states=kept)
        for (batch,) in batches.steps(0, 2):
            targets = training._teach(teacher, batch, objective.teacher_needs)
            own = capture(student, batch, objective.student_needs)
            values.append(objective(own, targets, batch).total.item())
    assert values[:2] == pytest.approx(values[2:], rel=1e-4)
    assert min(values) > 0


def test_they_are_found_again_and_only_missing_files_are_computed(
    shown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    states = module._states

    def watched(teacher: Any, rows: Dataset, *rest: Any) -> Any:
        made.append(len(rows))
        return states(teacher, rows, *rest)

    monkeypatch.setattr(module, "_states", watched)
    monkeypatch.setattr(module, "_block_rows", lambda *given: 3)
    first = computed(tmp_path, shown).padded(range(7), 16)
    assert made == [3, 3, 1]
    assert computed(tmp_path, shown).padded(range(7), 16).equal(first)
    assert made == [3, 3, 1]
    (place,) = tmp_path.iterdir()
    assert len(list(place.iterdir())) == 3
    sorted(place.iterdir())[1].unlink()
    assert computed(tmp_path, shown).padded(range(7), 16).equal(first)
    assert made == [3, 3, 1, 3]


def test_another_teacher_rows_layers_and_precision_are_not_taken_for_them(shown, build_model, tmp_path: Path) -> None:
    other = build_model("bert", seed=2).eval()
    show_attention(other)
    computed(tmp_path, shown)
    computed(tmp_path, other)
    computed(tmp_path, shown, rows=encoded_rows(LENGTHS[::-1]))
    computed(tmp_path, shown, Needs(hidden=frozenset({0, 2}), attention=frozenset({1, 3})))
    computed(tmp_path, shown, NEEDS | Needs(values=True))
    computed(tmp_path, shown.bfloat16())
    assert len(list(tmp_path.iterdir())) == 6


INTERMEDIATE = "task.intermediate={epochs: 2, batch_size: 64, learning_rate: 1e-3, log_every_steps: 1}"
ALONE = (*FEW_STEPS, INTERMEDIATE, "task.logits=null", "augment=null", "evaluate.undistilled=false", "general=null")
BOTH = (*ALONE, "task.logits={epochs: 2, batch_size: 64, learning_rate: 1e-3, log_every_steps: 1}")
JOINT = (*BOTH, "task.intermediate=null", "task.joint=true")


@pytest.mark.parametrize(
    "settings",
    [ALONE, BOTH, JOINT, (*JOINT, "student.vocabulary={size: 90}")],
    ids=["layers", "both", "joint", "joint, cut"],
)
def test_a_run_with_states_gives_the_student_of_one_without(
    settings: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[type] = []
    fit = training.fit

    def watched(student: Any, teacher: Any, *rest: Any, **options: Any) -> Any:
        asked.append(type(teacher))
        return fit(student, teacher, *rest, **options)

    monkeypatch.setattr("pipelines.task.fit", watched)
    succeed(TINY, *settings, "--output", tmp_path / "steps")
    without = len(asked)
    # What is said of rows that were read for their states is known from there.
    monkeypatch.setattr("pipelines.task.teacher_logits", lambda *given, **options: pytest.fail("asked again"))
    succeed(TINY, *settings, "runtime.states_cache_gb=1", "--output", tmp_path / "kept")
    assert issubclass(asked[0], PreTrainedModel)
    assert asked[without] is TeacherStates
    ours, theirs = (load_file(tmp_path / run / "task/student/model.safetensors") for run in ("kept", "steps"))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)
    assert not (tmp_path / "kept" / "task" / "teacher_states").exists()


def test_a_run_stopped_in_the_logits_phase_goes_on_with_the_same_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = (TINY, *BOTH, "runtime.states_cache_gb=1")
    succeed(*kept, "--output", tmp_path / "whole")
    fit = training.fit

    def stopped(*given: Any, **options: Any) -> Any:
        if options["name"] == "task.logits":
            raise RuntimeError("the power went")
        return fit(*given, **options)

    monkeypatch.setattr("pipelines.task.fit", stopped)
    assert run_cli(*kept, "--output", tmp_path / "stopped").status != 0
    assert (tmp_path / "stopped" / "task" / "intermediate" / "student.safetensors").is_file()
    monkeypatch.setattr("pipelines.task.fit", fit)
    monkeypatch.setattr(module, "_states", lambda *given: pytest.fail("computed again"))
    monkeypatch.setattr("pipelines.task.teacher_logits", lambda *given, **options: pytest.fail("asked again"))
    succeed(*kept, "--output", tmp_path / "stopped")
    ours, theirs = (load_file(tmp_path / run / "task/student/model.safetensors") for run in ("stopped", "whole"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("runtime.states_cache_gb=1e-6",), "runtime.states_cache_gb is 1e-06"),
        (("runtime.states_cache_gb=1", "task.losses.hidden.padding=included"), "counts padded positions"),
    ],
)
def test_a_run_says_why_it_keeps_none(settings: tuple[str, ...], says: str, tmp_path: Path) -> None:
    outcome = succeed(TINY, *ALONE, *settings, "--output", tmp_path / "run")
    assert says in outcome.out


def test_a_file_has_about_as_many_bytes_as_it_should(shown) -> None:
    rows = encoded_rows(LENGTHS * 1000)
    layout = state_layout(shown, rows, Collator(tiny.tokenizer(), None), NEEDS)
    block = module._block_rows(layout, np.array(rows["length"][:]))
    kept = sum(LENGTHS * 1000) / len(rows) * block * layout.token_bytes
    assert kept == pytest.approx(module.FILE_BYTES, rel=0.01)
