"""Stage task: task distillation, first the intermediate layers, then the logits."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from distill.activations import Needs
from distill.checkpoint import sha256_of, write_folder, write_json, write_tensors
from distill.config import Config, TaskOptions, to_plain
from distill.data import Placement, fingerprint
from distill.initialization import adopt_head
from distill.losses import Match, check_models
from distill.objective import Objective
from distill.settings import UserError
from distill.students import Student, build_student, load_body
from distill.teacher_logits import teacher_logits
from distill.teachers import check_length, vocabulary_hash
from distill.training import FitResult, TrainingOptions, Validation, distillation_loss, fit
from pipelines import general, vocabulary
from pipelines.augment import training_rows
from pipelines.estimate import training_work
from pipelines.run import Run
from pipelines.stage import Stage, Work
from pipelines.teacher_states import asked_again, own_states, states_for

_log = logging.getLogger(__name__)


class TaskStage(Stage):
    name = "task"
    after = ("teacher", "general", "augment")

    def is_on(self, config: Config) -> bool:
        return config.task is not None

    def check(self, run: Run) -> None:
        options = run.task_options
        if options.intermediate is None and options.logits is None:
            raise UserError("task: both phases are off. Set task.intermediate or task.logits, or task=null.")
        if options.compares_layers and not options.losses.intermediate():
            raise UserError(
                "task.losses: every term of the intermediate phase is off; set task.intermediate=null and "
                "task.joint=false."
            )
        if options.logits is not None and not options.losses.prediction():
            raise UserError("task.losses: neither logits nor labels is on; set task.logits=null.")
        if options.compares_layers:
            check_models(options.losses, "task.losses", run.student_config(), run.checkpoint.config)
        for key, given in (("task.unlabelled", run.unlabelled), ("augment", run.config.augment)):
            if given is not None and not any(more for _, _, more in phases(options)):
                raise UserError(
                    f"{key}: no phase trains on its rows: there is no intermediate phase, and task.augmented_logits is "
                    f"false. Set task.augmented_logits=true, task.intermediate={{}}, or {key}=null."
                )
        check_length(run.checkpoint, run.config.data.max_length, "data.max_length")
        check_length(run.student_source, run.config.data.max_length, "data.max_length")
        if run.config.teacher.training is None:
            run.load_task_teacher()

    def depends_on(self, run: Run) -> Mapping[str, Any]:
        return {
            "task": _task_settings(run),
            "teacher.dropout": run.config.teacher.dropout,
            "student": run.student_settings,
            "layer_map": to_plain(run.config.layer_map),
            "data": to_plain(run.config.data),
            "seed": run.config.seed,
            "data content": run.data_hash,
            **({} if run.unlabelled is None else {"unlabelled content": fingerprint(run.unlabelled)}),
            "student vocabulary": vocabulary_hash(run.tokenizer),
            "teacher weights": run.teacher_hash,
        }

    def plan(self, run: Run) -> list[Work]:
        return [
            training_work(run, f"task.{name}", options, epoch_rows(run, more=more))
            for name, options, more in phases(run.task_options)
        ]

    def run(self, run: Run) -> dict[str, Any]:
        options = run.task_options
        figures: dict[str, Any] = {}
        if run.cut is not None:
            figures["vocabulary"] = vocabulary.describe(run)
            run.say(f"task: the student's vocabulary: {vocabulary.sentence(figures['vocabulary'])}")
        train = run.paired_encoded.encode(training_rows(run), "training rows")
        teacher = run.load_task_teacher()
        began = time.monotonic()
        student = self._first_student(run, teacher, train)
        figures["first_weights_seconds"] = time.monotonic() - began
        frozen = run.frozen_for_training(teacher)
        results: dict[str, FitResult] = {}
        teacher_seconds: dict[str, float] = {}
        answers: Dataset | None = None
        if options.intermediate is not None:
            results["intermediate"], answers = self._intermediate(run, student, frozen, train, teacher_seconds)
            # Read anew in float32: the frozen one may be in bf16.
            adopt_head(student, run.load_task_teacher())
        if options.logits is not None:
            rows = train if options.augmented_logits else run.paired_encoded.features["train"]
            results["logits"] = self._logits(run, student, frozen, rows, answers, teacher_seconds)
        if run.is_main:
            save_student(student, run, student_folder(run))
        for phase in results:
            run.checkpoints("task", phase).clear()
            if run.is_main:
                shutil.rmtree(_phase_file(run, phase).parent, ignore_errors=True)
        if run.is_main:
            shutil.rmtree(_own_logits(run), ignore_errors=True)
            shutil.rmtree(own_states(run), ignore_errors=True)
        return {
            **figures,
            "training_rows": len(train),
            **({} if run.unlabelled is None else {"unlabelled_rows": len(run.unlabelled)}),
            "layer_map": run.layer_map.describe(),
            "steps": sum(result.steps for result in results.values()),
            "tokens": sum(result.tokens for result in results.values()),
            "phases": {
                name: {
                    **result.figures(),
                    "seconds": result.seconds,
                    "teacher_seconds": teacher_seconds.get(name, 0.0),
                    "validation": result.best,
                }
                for name, result in results.items()
            },
        }

    def _first_student(self, run: Run, teacher: PreTrainedModel, train: Dataset) -> Student:
        student = build_student(
            run.student_config(), run.task, run.config.student, teacher.config.hidden_size, run.config.seed, run.cut
        )
        if run.config.general is not None:
            load_body(student, general.student_folder(run))
            student.projections.load_state_dict(load_file(general.student_folder(run) / "projections.safetensors"))
            student.to(run.device)
            adopt_head(student, teacher)
        else:
            options = run.task_options.intermediate or run.task_options.logits
            assert options is not None
            general.initialize(run, student, teacher, run.paired_encoded.batches(train, options, placement=Placement()))
        return student

    def _intermediate(
        self, run: Run, student: Student, teacher: PreTrainedModel, train: Dataset, teacher_seconds: dict[str, float]
    ) -> tuple[FitResult, Dataset | None]:
        """With the teacher's logits, where its states are kept and the next phase asks for these of the same rows.
        teacher_seconds: takes what asking the teacher beforehand took, by phase."""
        options = run.task_options.intermediate
        assert options is not None
        done = _phase_file(run, "intermediate")
        finished = _read_phase(done)
        later = _needs_later(run)
        objective = Objective(run.task_options.terms()["intermediate"], Match(run.layer_map, run.task.logits))
        began = time.monotonic()
        states = None
        if finished is None or later.logits:
            states = states_for(run, teacher, train, objective.teacher_needs | later, objective, options)
        logits = states.logits if states else None
        teacher_seconds["intermediate"] = time.monotonic() - began
        if finished is not None:  # the run was stopped in the logits phase
            student.load_state_dict(load_file(done))
            return finished, logits
        both = run.paired_encoded
        held_out = both.batches(both.features["validation"], options)

        def validate() -> dict[str, float]:
            return distillation_loss(student, teacher, objective, held_out, run.accelerator)

        result = fit(
            student,
            states or teacher,
            objective,
            both.batches(train, options, states=states),
            options,
            run.session,
            name="task.intermediate",
            checkpoints=run.checkpoints("task", "intermediate"),
            validation=Validation(validate, "loss", higher_is_better=False),
        )
        if run.is_main:
            write_tensors(done, student.state_dict())
            write_json(done.with_suffix(".json"), {**dataclasses.asdict(result), "sha256": sha256_of(done)})
        return result, logits

    def _logits(
        self,
        run: Run,
        student: Student,
        teacher: PreTrainedModel,
        train: Dataset,
        answers: Dataset | None,
        teacher_seconds: dict[str, float],
    ) -> FitResult:
        """answers: the teacher's logits of these rows where they are known already."""
        options = run.task_options.logits
        assert options is not None
        objective = Objective(run.task_options.terms()["logits"], Match(run.layer_map, run.task.logits))
        began = time.monotonic()
        states = states_for(run, teacher, train, objective.teacher_needs, objective, options)
        logits = states.logits if states else answers
        alone = objective.teacher_needs == Needs(logits=True) and not run.config.teacher.dropout
        if logits is None and alone and (not run.pieces_correspond or asked_again(run, options, len(train))):
            logits = self._teacher_logits(run, teacher, train)
        if logits is not None:
            train = concatenate_datasets([train, logits], axis=1)
        teacher_seconds["logits"] = time.monotonic() - began
        return fit(
            student,
            states or teacher,
            objective,
            run.paired_encoded.batches(train, options, states=states),
            options,
            run.session,
            name="task.logits",
            checkpoints=run.checkpoints("task", "logits"),
            validation=run.encoded.validation(student.model),
        )

    def _teacher_logits(self, run: Run, teacher: PreTrainedModel, rows: Dataset) -> Dataset:
        """Of the rows of the logits phase, given as they are trained on."""
        if not run.pieces_correspond:
            # There is no other phase then, so that this one reads all there are.
            rows = run.teacher_encoded.encode(training_rows(run), "training rows for the teacher")
        bar = tqdm(total=len(rows), desc="teacher logits", unit="row", dynamic_ncols=True, disable=not run.is_main)
        shared = run.config.runtime.logits_cache
        with bar:
            return teacher_logits(
                teacher,
                rows,
                run.teacher_encoded.collator,
                run.accelerator,
                folder=Path(shared) if shared else _own_logits(run),
                batch_size=run.config.evaluate.batch_size,
                progress=bar.update,
            )


def _task_settings(run: Run) -> dict[str, Any]:
    """As the stage depends on them: what is not set does not count, so that it may be new."""
    settings: dict[str, Any] = to_plain(run.task_options)
    if settings["unlabelled"] is None:
        del settings["unlabelled"]
    return settings


def epoch_rows(run: Run, *, more: bool) -> int:
    """Sequences of an epoch of a phase, at most: of the training split, and of its copies and the unlabelled rows where
    they take part."""
    rows = len(run.encoded.features["train"])
    if not more:
        return rows
    copies = 1 + (run.config.augment.copies if run.config.augment else 0)
    unlabelled = len(run.unlabelled) if run.unlabelled is not None else 0
    # A context may be several sequences; how many is known of the training rows.
    return rows * copies + round(unlabelled * rows / len(run.data.splits["train"]))


def phases(options: TaskOptions) -> Iterator[tuple[str, TrainingOptions, bool]]:
    """The phases that are on: name, training, and whether augmented and unlabelled rows take part."""
    if options.intermediate is not None:
        yield "intermediate", options.intermediate, True
    if options.logits is not None:
        yield "logits", options.logits, options.augmented_logits


def _needs_later(run: Run) -> Needs:
    """What the logits phase will ask the teacher about the rows of the intermediate phase, beside their states."""
    options = run.task_options
    same_rows = options.augmented_logits or (run.config.augment is None and options.unlabelled is None)
    if options.logits is None or not same_rows:
        return Needs()
    return Needs(logits="logits" in options.terms()["logits"])


def student_folder(run: Run) -> Path:
    """The distilled student, a plain checkpoint."""
    return run.folder / "task" / "student"


def save_student(student: Student, run: Run, folder: Path) -> None:
    """Model and tokenizer; the projections have done their work."""

    def save(temporary: Path) -> None:
        student.model.save_pretrained(temporary)
        run.tokenizer.save_pretrained(temporary)

    write_folder(folder, save)


def _own_logits(run: Run) -> Path:
    """The teacher's logits where runs share none."""
    return run.folder / "task" / "teacher_logits"


def _read_phase(weights: Path) -> FitResult | None:
    """The result of a finished phase whose weights are as they were written; else it goes on from its checkpoints."""
    try:
        result = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))
        if result.pop("sha256") == sha256_of(weights):
            return FitResult(**result)
        damage = "it has other content than was written"
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        damage = f"{weights.with_suffix('.json').name} cannot be read"
    _log.warning("%s is damaged: %s. Going on from the checkpoints of its phase.", weights, damage)
    return None


def _phase_file(run: Run, phase: str) -> Path:
    return run.folder / "task" / phase / "student.safetensors"
