"""One training on the toy, for the tests of fit(): its data, teacher, student, and the call."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from distill import tiny
from distill.attention import show_attention
from distill.checkpoint import Checkpoints
from distill.data import Batches, Collator, Placement, tokenize
from distill.layer_map import LayerMapOptions, build_layer_map
from distill.losses import (
    AttentionLoss,
    EmbeddingLoss,
    HiddenLoss,
    LabelLoss,
    LogitsLoss,
    LossTerm,
    Match,
)
from distill.objective import Objective
from distill.students import Student, StudentOptions, build_student, student_config
from distill.tasks import TASKS
from distill.training import FitResult, TrainingOptions, Validation, distillation_loss, fit
from tests.builders import ListTracker, new_session

TASK = TASKS["single_label_classification"]
LAYERS: dict[str, LossTerm] = {"embedding": EmbeddingLoss(), "attention": AttentionLoss(), "hidden": HiddenLoss()}
PREDICTION: dict[str, LossTerm] = {"logits": LogitsLoss(), "labels": LabelLoss()}
OPTIONS = TrainingOptions(
    max_steps=12, batch_size=16, learning_rate=1e-3, save_every_steps=5, evaluate_every_steps=4, log_every_steps=1
)


@cache
def features() -> Any:
    return tokenize(tiny.load()["train"], TASK, tiny.tokenizer(), 32, "encode")


@cache
def teacher() -> PreTrainedModel:
    config = BertConfig(
        vocab_size=len(tiny.tokenizer()),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = BertForSequenceClassification(config).eval().requires_grad_(False)
        model.classifier.weight.mul_(20)  # a teacher with opinions
    show_attention(model)
    return model


class Setting:
    """One training: everything is new but the features, the teacher and the folder."""

    def __init__(self, folder: Path, placement: Placement | None = None, *, sharded: bool = False) -> None:
        self.features, self.teacher, self.folder = features(), teacher(), folder
        self.placement, self.sharded = placement or Placement(), sharded

    def student(self, dropout: float = 0.1) -> Student:
        shape = StudentOptions(layers=2, width=24, heads=4, intermediate_size=48, dropout=dropout)
        return build_student(student_config(self.teacher.config, shape), TASK, shape, 32, seed=3)

    def objective(self, terms: dict[str, LossTerm]) -> Objective:
        return Objective(terms, Match(build_layer_map(LayerMapOptions(), 2, 4), TASK.logits))

    def batches(self, options: TrainingOptions) -> Batches:
        return Batches(
            self.features,
            Collator(tiny.tokenizer(), TASK),
            batch_size=options.batch_size,
            accumulation=options.gradient_accumulation_steps,
            seed=5,
            placement=self.placement,
        )

    def fit(
        self,
        student: Student,
        options: TrainingOptions = OPTIONS,
        *,
        terms: dict[str, LossTerm] | None = None,
        folder: str = "unbroken",
        stop_after: int | None = None,
        validation: Validation | None = None,
        tracker: ListTracker | None = None,
    ) -> FitResult:
        session = new_session(tracker, stop_after, sharded=self.sharded)
        student.to(session.accelerator.device)
        self.teacher.to(session.accelerator.device)
        return fit(
            student,
            self.teacher,
            self.objective({**LAYERS, **PREDICTION} if terms is None else terms),
            self.batches(options),
            options,
            session,
            name="task.test",
            checkpoints=Checkpoints(self.folder / folder, session.accelerator),
            validation=validation,
        )

    def held_out(self, student: Student) -> Validation:
        """The loss on the training rows without dropout, as the intermediate phase validates."""

        def run() -> dict[str, float]:
            accelerator = new_session().accelerator
            objective = self.objective({**LAYERS, **PREDICTION})
            return distillation_loss(student, self.teacher, objective, self.batches(OPTIONS), accelerator)

        return Validation(run, "loss", higher_is_better=False)


def dtypes_of_a_second_training(setting: Setting) -> list[str]:
    """What a layer of the student gives in each forward pass, in a run in bf16; the first finds what trains."""
    AcceleratorState._reset_state()  # one process can hold one precision only
    try:
        Accelerator(cpu=True, mixed_precision="bf16")
        student = setting.student(dropout=0)
        seen: list[str] = []
        watched = student.model.base_model.encoder.layer[0].intermediate.dense  # a copy takes the hook along
        watched.register_forward_hook(lambda module, inputs, output: seen.append(str(output.dtype)))
        for folder in ("bf16_first", "bf16_second"):
            seen.clear()
            setting.fit(student, replace(OPTIONS, max_steps=6), terms={"attention": AttentionLoss()}, folder=folder)
    finally:
        AcceleratorState._reset_state()
    return seen


def require_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different
