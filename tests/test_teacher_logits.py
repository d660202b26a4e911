"""Claims about the teacher's logits that are computed once: they are what the teacher says of each row, they are found
again and never taken for another teacher's or other rows', and training on them is training on the teacher."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, concatenate_datasets
from transformers import BertConfig, PreTrainedModel

from distill import teacher_logits as module
from distill import teacher_states as states_module
from distill import tiny, training
from distill.activations import Activations, Needs
from distill.data import Batches, Collator
from distill.losses import LogitsLoss, Match
from distill.objective import Objective
from distill.tasks import TASKS
from distill.teacher_logits import FEATURES, teacher_logits
from distill.teacher_states import state_layout, teacher_states
from pipelines import task as task_stage
from tests.builders import FEW_STEPS, TINY, succeed

LENGTHS = [5, 12, 3, 9, 16, 7, 4]


def model_for(task: str, seed: int = 0) -> PreTrainedModel:
    config = BertConfig(
        vocab_size=len(tiny.tokenizer()),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels={"regression": 1, "question_answering": 2}.get(task, 3),
        initializer_range=0.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = TASKS[task].auto_class.from_config(config)
    return model.eval().requires_grad_(False)


def features_for(task: str) -> Dataset:
    random = np.random.default_rng(0)
    labels: dict[str, Any] = {
        "single_label_classification": [0] * 7,
        "multi_label_classification": [[0, 1, 0]] * 7,
        "regression": [0.5] * 7,
        "token_classification": [[0] * length for length in LENGTHS],
        "question_answering": [[1, 2]] * 7,
    }
    ids = [random.integers(5, 100, length).tolist() for length in LENGTHS]
    return Dataset.from_dict({"input_ids": ids, "labels": labels[task], "length": LENGTHS})


def computed(folder: Path, features: Dataset, teacher: PreTrainedModel, task: str) -> Dataset:
    collator = Collator(tiny.tokenizer(), TASKS[task])
    return teacher_logits(teacher, features, collator, Accelerator(cpu=True), folder=folder, batch_size=3)


def beside_states(folder: Path, features: Dataset, teacher: PreTrainedModel, task: str) -> Dataset:
    """Of the pass that computes hidden states too."""
    collator, needs = Collator(tiny.tokenizer(), TASKS[task]), Needs(hidden=frozenset({1}), logits=True)
    layout = state_layout(teacher, features, collator, needs)
    states = teacher_states(teacher, features, collator, Accelerator(cpu=True), needs, layout, folder=folder)
    assert states.logits is not None
    return states.logits


@pytest.mark.parametrize("way", [computed, beside_states])
@pytest.mark.parametrize("task", TASKS)
def test_each_row_has_what_the_teacher_says_of_it_alone(
    task: str, way: Callable[..., Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states_module, "_block_rows", lambda *given: 3)
    monkeypatch.setattr(states_module, "BATCH_TOKENS", 32)
    teacher, features = model_for(task), features_for(task)
    found = way(tmp_path, features, teacher, task)
    assert found.features == FEATURES
    for ids, flat in zip(features["input_ids"], found["teacher_logits"], strict=True):
        output = teacher(input_ids=torch.tensor([ids]))
        if task == "question_answering":
            expected = torch.stack((output.start_logits, output.end_logits), -1)
        else:
            expected = output.logits
        torch.testing.assert_close(torch.tensor(flat), expected.flatten(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_the_loss_on_them_is_the_loss_on_the_teacher(task: str, tmp_path: Path) -> None:
    teacher, student, features = model_for(task), model_for(task, seed=1), features_for(task)
    both = concatenate_datasets([features, computed(tmp_path, features, teacher, task)], axis=1)
    objective = Objective({"logits": LogitsLoss(temperature=2)}, Match(None, TASKS[task].logits))  # type: ignore[arg-type]
    values = []
    for rows in (features, both):
        batches = Batches(rows, Collator(tiny.tokenizer(), TASKS[task]), batch_size=4, seed=0)
        for (batch,) in batches.steps(0, 2):
            assert ("teacher_logits" in batch) is (rows is both)
            own = training.capture(student, batch, Needs(logits=True))
            targets = training._teach(None if rows is both else teacher, batch, objective.teacher_needs)
            values.append(objective(own, targets, batch).total.item())
    assert values[:2] == pytest.approx(values[2:], rel=1e-4)
    assert values[0] > 0


def test_they_are_found_again_and_only_missing_files_are_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    predict = module.predict

    def watched(model: Any, features: Dataset, *rest: Any) -> list[np.ndarray]:
        asked.append(len(features))
        return predict(model, features, *rest)

    monkeypatch.setattr(module, "predict", watched)
    monkeypatch.setattr(module, "BLOCK", 3)
    task = "single_label_classification"
    teacher, features = model_for(task), features_for(task)
    first = computed(tmp_path, features, teacher, task)["teacher_logits"][:]
    assert asked == [3, 3, 1]
    assert computed(tmp_path, features, teacher, task)["teacher_logits"][:] == first
    assert asked == [3, 3, 1]
    (place,) = tmp_path.iterdir()
    shutil.rmtree(sorted(place.iterdir())[1])
    assert computed(tmp_path, features, teacher, task)["teacher_logits"][:] == first
    assert asked == [3, 3, 1, 3]


def test_another_teacher_other_rows_and_another_precision_are_not_taken_for_them(tmp_path: Path) -> None:
    task = "single_label_classification"
    teacher, features = model_for(task), features_for(task)
    computed(tmp_path, features, teacher, task)
    computed(tmp_path, features, model_for(task, seed=2), task)
    computed(tmp_path, features.select([1, 0, 2, 3, 4, 5, 6]), teacher, task)
    computed(tmp_path, features, teacher.bfloat16(), task)
    assert len(list(tmp_path.iterdir())) == 4


def test_labels_do_not_matter(tmp_path: Path) -> None:
    task = "single_label_classification"
    teacher, features = model_for(task), features_for(task)
    computed(tmp_path, features, teacher, task)
    computed(tmp_path, features.remove_columns("labels").add_column("labels", [1] * 7), teacher, task)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("epochs", "asks"), [(1, True), (3, False)])
def test_a_run_asks_the_teacher_once_for_each_row(
    epochs: int, asks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one epoch the step asks it; in several it is asked before, and the files are gone with the stage."""
    asked: list[bool] = []
    teach = training._teach

    def watched(teacher: Any, batch: Any, needs: Needs) -> Activations:
        asked.append("teacher_logits" not in batch and needs == Needs(logits=True))
        return teach(teacher, batch, needs)

    monkeypatch.setattr(training, "_teach", watched)
    once = f"task.logits={{epochs: {epochs}, batch_size: 64}}"
    succeed(TINY, *FEW_STEPS, once, "evaluate.undistilled=false", "--output", tmp_path / "run")
    assert any(asked) is asks
    assert not (tmp_path / "run" / "task" / "teacher_logits").exists()


def test_runs_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = (f"runtime.logits_cache={tmp_path / 'logits'}", "task.logits={epochs: 2, batch_size: 64}", "general=null")
    alone = ("evaluate.undistilled=false", "augment=null")
    succeed(TINY, *FEW_STEPS, *shared, *alone, "--output", tmp_path / "one")

    def never(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("the teacher was asked again")

    real = task_stage.teacher_logits
    monkeypatch.setattr(module, "predict", never)
    succeed(TINY, *FEW_STEPS, *shared, *alone, "task.logits.learning_rate=1e-4", "--output", tmp_path / "two")
    assert task_stage.teacher_logits is real
