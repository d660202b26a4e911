"""`tinybert report`: one self-contained HTML file about a finished run, from its folder, its models, its test rows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from transformers import AutoModel, PreTrainedModel

from distill.checkpoint import write_text
from distill.settings import UserError
from distill.teachers import load_encoder
from pipelines import general, task
from pipelines.report.answers import Test, ask_both
from pipelines.report.blocks import Block, Section, Text
from pipelines.report.comparison import Comparison, compare, disagreements
from pipelines.report.maps import MOST_PIECES, Sentence, chosen_sentences, maps
from pipelines.report.page import render
from pipelines.report.recipe import recipe
from pipelines.report.record import read_record
from pipelines.report.summary import head
from pipelines.report.trainings import costs, curves
from pipelines.run import Run

FILE = "report.html"


@dataclass(frozen=True)
class Wishes:
    """What the caller may choose."""

    sentences: Sequence[str] = ()
    """Whose attention is shown; chosen from the test rows where there are none."""
    price_per_hour: float | None = None


def write_report(run: Run, wishes: Wishes, file: Path) -> None:
    """Compute what the run folder does not hold, and write the page under a temporary name, then rename it.

    Raises:
        UserError: a file of the run folder is damaged; an empty sentence.
    """
    for sentence in wishes.sentences:
        _require_text(sentence)
    record = read_record(run.folder)
    sections: list[Section] = []
    test: Test | None = None
    found: Comparison | None = None
    if run.config.task is not None:
        teacher = run.load_task_teacher()
        student = run.task.auto_class.from_pretrained(task.student_folder(run)).to(run.device)
        test = ask_both(run, teacher, student)
        found = compare(test)
        sections += [
            Section("errors", "Where they err", found.errors),
            Section("calibration", "Can their probabilities be trusted?", found.calibration),
            Section("disagreements", "Where teacher and student disagree", disagreements(test, found)),
        ]
    else:
        teacher = load_encoder(run.checkpoint).to(run.device)
        student = AutoModel.from_pretrained(general.student_folder(run)).to(run.device)
    sections += [
        Section("attention", "Where they look", _attention(run, wishes, teacher, student, test, found)),
        Section("training", "How the training went", curves(run, record)),
        Section("recipe", "Recipe", recipe(run, record)),
        Section("cost", "Time and cost", costs(record, wishes.price_per_hour)),
    ]
    title = f"Distillation report: {run.folder.resolve().name}"
    write_text(file, render(title, head(run, record, test, teacher, student), sections, _facts(run)))


def _attention(
    run: Run,
    wishes: Wishes,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    test: Test | None,
    found: Comparison | None,
) -> list[Block]:
    how = ""
    sentences = [Sentence(text, None, "Given with --sentence") for text in wishes.sentences]
    if not sentences and test is not None and found is not None:
        sentences = chosen_sentences(test, found)
        how = (
            " The sentences are test rows: the first two of the disagreements above, and the first row on which the "
            f"models agree, each cut to {MOST_PIECES} word pieces."
        )
    lead = (
        "Each row of a map is a word piece and shows what it looks at, the mean over heads; darker is more (the shade "
        f"is the root of the weight).{how}"
    )
    return [*([Text(lead)] if sentences else []), *maps(run, teacher, student, sentences)]


def _require_text(sentence: str) -> None:
    try:
        sentence.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"--sentence: {sentence!r} is not UTF-8. Give it in UTF-8.") from None
    if not sentence.strip():
        raise UserError("--sentence: it is empty. Give a sentence, or leave it out.")


def _facts(run: Run) -> list[str]:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return [
        f"Written {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())} from {run.folder}, with {versions}.",
        (
            "Predictions and attention were computed anew from the saved models, in float32, on the run's test split; "
            "all else is what the stages wrote."
        ),
    ]


__all__ = ["FILE", "Wishes", "write_report"]
