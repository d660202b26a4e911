"""Stage evaluate: teacher, student, and the same student trained on the labels alone, on the same test rows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from distill.config import Config, LogitsTraining, to_plain
from distill.evaluation import latency_ms
from distill.losses import LabelLoss, Match
from distill.objective import Objective
from distill.students import Student, build_student
from distill.teachers import vocabulary_hash
from distill.training import fit, total_steps
from pipelines.encoded import Encoded
from pipelines.estimate import training_work
from pipelines.machine import machine
from pipelines.run import Run
from pipelines.stage import Stage, Work
from pipelines.task import epoch_rows, phases, save_student, student_folder

ROUNDS = 5
"""Of measuring latency, a model after the other."""


class EvaluateStage(Stage):
    name = "evaluate"
    after = ("teacher", "task")

    def is_on(self, config: Config) -> bool:
        return config.task is not None

    def depends_on(self, run: Run) -> Mapping[str, Any]:
        return {
            "evaluate": to_plain(run.config.evaluate),
            "task.metric": run.metric,
            "student": run.student_settings,
            "seed": run.config.seed,
            "data content": run.data_hash,
            "student vocabulary": vocabulary_hash(run.tokenizer),
        }

    def plan(self, run: Run) -> list[Work]:
        work = [Work(self.name, f"{len(run.data.splits['test']):,} test rows")]
        if run.config.evaluate.undistilled:
            rows = len(run.encoded.features["train"])
            work.append(training_work(run, "evaluate.undistilled", self._training(run), rows, distils=False))
        return work

    def run(self, run: Run) -> dict[str, Any]:
        models: dict[str, tuple[Encoded, PreTrainedModel]] = {}
        if run.config.evaluate.undistilled:
            models["undistilled_student"] = run.encoded, self._undistilled(run)
        student = run.task.auto_class.from_pretrained(student_folder(run)).to(run.device)
        models["student"] = run.encoded, student
        models["teacher"] = run.teacher_encoded, run.load_task_teacher()
        times = _latencies(models)
        figures: dict[str, Any] = {
            who: self._report(rows, model) | {"latency_ms": times[who]} for who, (rows, model) in models.items()
        }
        teacher, own = (figures[who]["metrics"][run.metric] for who in ("teacher", "student"))
        figures["retention"] = own / teacher if teacher else None
        figures["machine"] = machine() | {"device": run.device.type, "threads": torch.get_num_threads()}
        return figures

    def _training(self, run: Run) -> LogitsTraining:
        """The logits phase's settings, over as many steps as both phases took."""
        given = run.config.evaluate.undistilled_training
        if given is not None:
            return given
        task = run.task_options
        base = task.logits or LogitsTraining()
        steps = sum(
            total_steps(phase, -(-epoch_rows(run, more=more) // phase.batch_size)) for _, phase, more in phases(task)
        )
        return replace(base, max_steps=steps)

    def _undistilled(self, run: Run) -> PreTrainedModel:
        options = self._training(run)
        alone = replace(run.config.student, projection="auto")
        student = build_student(run.student_config(), run.task, alone, run.config.student.width, run.config.seed)
        learner = Student(student.model, nn.ModuleDict())
        checkpoints = run.checkpoints("evaluate", "undistilled")
        fit(
            learner,
            None,
            Objective({"labels": LabelLoss()}, Match(run.layer_map, run.task.logits)),
            run.encoded.batches(run.encoded.features["train"], options),
            options,
            run.session,
            name="evaluate.undistilled",
            checkpoints=checkpoints,
            validation=run.encoded.validation(learner.model),
        )
        if run.is_main:
            save_student(learner, run, undistilled_folder(run))
        checkpoints.clear()
        return learner.model

    def _report(self, rows: Encoded, model: PreTrainedModel) -> dict[str, Any]:
        metrics = rows.figures(model, "test")
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return {
            "metrics": metrics,
            "parameters": parameters,
            "bytes": sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        }


def _latencies(models: Mapping[str, tuple[Encoded, PreTrainedModel]]) -> dict[str, float]:
    """Milliseconds of a row at batch 1, by model; they go round, so that what else the machine does falls on all."""
    rounds = [
        {who: latency_ms(model, rows.features["test"], rows.collator, rows=10) for who, (rows, model) in models.items()}
        for _ in range(ROUNDS)
    ]
    return {who: statistics.median(times[who] for times in rounds) for who in models}


def undistilled_folder(run: Run) -> Path:
    """The student trained on labels alone, kept for comparison."""
    return run.folder / "evaluate" / "undistilled_student"
