"""Stage teacher: fine-tune the given teacher on the task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from distill.checkpoint import write_folder
from distill.config import Config, to_plain
from distill.losses import LabelLoss, Match
from distill.objective import Objective
from distill.students import Student
from distill.teachers import load_teacher
from distill.training import fit
from pipelines.estimate import training_work
from pipelines.run import Run
from pipelines.stage import Stage, Work


class TeacherStage(Stage):
    name = "teacher"

    def is_on(self, config: Config) -> bool:
        return config.task is not None and config.teacher.training is not None

    def depends_on(self, run: Run) -> Mapping[str, Any]:
        return {
            "teacher": to_plain(run.config.teacher),
            "task.type": run.task_options.type,
            "task.metric": run.metric,
            "data": to_plain(run.config.data),
            "seed": run.config.seed,
            "data content": run.data_hash,
            "teacher weights": run.teacher_hash,
        }

    def plan(self, run: Run) -> list[Work]:
        options = run.config.teacher.training
        assert options is not None
        rows = len(run.teacher_encoded.features["train"])
        return [training_work(run, "teacher", options, rows, trains="teacher", distils=False)]

    def run(self, run: Run) -> dict[str, Any]:
        options = run.config.teacher.training
        assert options is not None
        model = load_teacher(run.checkpoint, run.task, run.data.names, fresh_head=True).requires_grad_(True)
        # fit() trains a Student: here the teacher itself is one, without projections.
        learner = Student(model, nn.ModuleDict())
        objective = Objective({"labels": LabelLoss()}, Match(run.layer_map, run.task.logits))

        rows, checkpoints = run.teacher_encoded, run.checkpoints("teacher")
        result = fit(
            learner,
            None,
            objective,
            rows.batches(rows.features["train"], options),
            options,
            run.session,
            name=self.name,
            checkpoints=checkpoints,
            validation=rows.validation(model),
        )
        if run.is_main:

            def save(folder: Any) -> None:
                model.save_pretrained(folder)
                rows.tokenizer.save_pretrained(folder)

            write_folder(run.teacher_folder, save)
        checkpoints.clear()
        return {**result.figures(), "validation": result.best}
