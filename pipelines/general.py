"""Stage general: general distillation of the encoder on unlabelled text, from the teacher as it was given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from distill import initialization as first_weights
from distill.checkpoint import write_folder, write_tensors
from distill.config import Config, GeneralOptions, to_plain
from distill.corpus import StreamBatches, load_corpus, pack
from distill.data import Collator, Placement, fingerprint
from distill.losses import Logits, Match, check_models
from distill.objective import Objective
from distill.settings import UserError
from distill.students import Student, build_student
from distill.teachers import check_length, load_encoder
from distill.training import StepSource, TrainingSource, fit
from pipelines import vocabulary
from pipelines.estimate import training_work
from pipelines.run import Run
from pipelines.stage import Stage, Work


class GeneralStage(Stage):
    name = "general"

    def is_on(self, config: Config) -> bool:
        return config.general is not None

    def check(self, run: Run) -> None:
        options = _options(run)
        if options.streaming and options.training.max_steps is None:
            raise UserError(
                "general.training.max_steps: a streaming corpus has no known length; set the number of steps."
            )
        if not options.losses.intermediate():
            raise UserError("general.losses: every term is off; leave at least one on.")
        check_models(options.losses, "general.losses", run.student_config(), run.checkpoint.config)
        check_length(run.checkpoint, options.max_length, "general.max_length")
        load_corpus(options.corpus, streaming=options.streaming)

    def depends_on(self, run: Run) -> Mapping[str, Any]:
        options = _options(run)
        corpus = "streamed" if options.streaming else fingerprint(_documents(run))
        return {
            "general": to_plain(options),
            "teacher.dropout": run.config.teacher.dropout,
            "data.padding": run.config.data.padding,
            "student": run.student_settings,
            "layer_map": to_plain(run.config.layer_map),
            "teacher.model": run.config.teacher.model,
            "seed": run.config.seed,
            "corpus content": corpus,
            "teacher weights": run.teacher_hash,
        }

    def plan(self, run: Run) -> list[Work]:
        options = _options(run)
        rows = 0 if options.streaming else len(_sequences(run, _documents(run)))
        return [training_work(run, "general", options.training, rows, length=options.max_length)]

    def run(self, run: Run) -> dict[str, Any]:
        options = _options(run)
        teacher = load_encoder(run.checkpoint).to(run.device)
        student = build_student(
            run.student_config(), None, run.config.student, teacher.config.hidden_size, run.config.seed, run.cut
        )
        initialize(run, student, teacher, batches(run, Placement()))
        objective = Objective(options.losses.intermediate(), Match(run.layer_map, Logits.CLASSES))
        checkpoints = run.checkpoints("general")
        result = fit(
            student,
            run.frozen_for_training(teacher),
            objective,
            batches(run, run.placement),
            options.training,
            run.session,
            name=self.name,
            checkpoints=checkpoints,
        )
        if run.is_main:
            save_encoder(student, run, student_folder(run))
        checkpoints.clear()
        return {**result.figures(), **({} if run.cut is None else {"vocabulary": vocabulary.describe(run)})}


def batches(run: Run, placement: Placement) -> TrainingSource:
    """Training steps over the corpus."""
    options = _options(run)
    length = options.max_length if run.config.data.padding == "max_length" else None
    collator = Collator(run.checkpoint.tokenizer, None, length=length, spelling=run.spelling)
    if not options.streaming:
        return run.batches(_sequences(run, _documents(run)), options.training, collator, placement)
    rows = load_corpus(options.corpus, streaming=True)
    return StreamBatches(
        pack(rows, run.checkpoint.tokenizer, options.max_length),
        collator,
        batch_size=options.training.batch_size,
        accumulation=options.training.gradient_accumulation_steps,
        placement=placement,
    )


def _documents(run: Run) -> Dataset:
    with run.accelerator.main_process_first():
        documents = load_corpus(_options(run).corpus, streaming=False)
    assert isinstance(documents, Dataset)
    return documents


def _sequences(run: Run, documents: Dataset) -> Dataset:
    with run.accelerator.main_process_first():
        sequences: Dataset = pack(documents, run.checkpoint.tokenizer, _options(run).max_length)
    if not len(sequences):
        raise UserError("general.corpus: it holds no text. Check general.corpus.data_files.")
    return sequences


def student_folder(run: Run) -> Path:
    """The encoder, a plain checkpoint, and projections.safetensors beside it."""
    return run.folder / "general" / "student"


def save_encoder(student: Student, run: Run, folder: Path) -> None:
    def save(temporary: Path) -> None:
        student.model.save_pretrained(temporary)
        run.tokenizer.save_pretrained(temporary)
        write_tensors(temporary / "projections.safetensors", student.projections.state_dict())

    write_folder(folder, save)


def initialize(run: Run, student: Student, teacher: PreTrainedModel, source: StepSource) -> None:
    """Give a fresh student the weights that student.initialization asks for; `source` must be placed as one process
    alone, see sample_batches."""
    how = run.config.student.initialization
    first_weights.initialize(student, how, teacher, run.layer_map, first_weights.sample_batches(source, run.device))


def _options(run: Run) -> GeneralOptions:
    assert run.config.general is not None
    return run.config.general
