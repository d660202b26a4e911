"""What people see: the plan before a run and the table after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pipelines import vocabulary
from pipelines.doctor import Finding, Level
from pipelines.pipeline import Due
from pipelines.run import Run
from pipelines.stage import Work
from pipelines.terminal import printable

MARKS = {Level.OK: "green", Level.NOTE: "cyan", Level.WARNING: "bold yellow", Level.ERROR: "bold red"}
ROWS = (("teacher", "teacher"), ("student", "student"), ("undistilled_student", "same student, labels alone"))


def show_plan(run: Run, due: Sequence[Due], works: Sequence[Work]) -> None:
    """Stages with steps, tokens and an estimate of their time; the layer map; what to know of the data."""
    console = _console()
    student, teacher = run.config.student, run.checkpoint.config
    console.print(
        f"[bold]{escape(run.config.teacher.model)}[/] "
        f"({teacher.num_hidden_layers} layers, {teacher.hidden_size} wide) -> "
        f"student ({student.layers} layers, {student.width} wide, {student.heads} heads, "
        f"{student.intermediate_size} inner"
        + (f", embeddings {student.embedding_width} wide)" if student.embedding_width else ")")
    )
    console.print(f"layers: {run.layer_map.describe()}", highlight=False, markup=False)
    if run.cut is not None:
        told = vocabulary.sentence(vocabulary.describe(run))
        console.print(f"vocabulary: {told}", highlight=False, markup=False)
    if not run.pieces_correspond:
        console.print(
            f"tokenizer: the student reads the pieces of {run.config.student.tokenizer}, the teacher its own; only "
            "logits are distilled",
            highlight=False,
            markup=False,
        )
    if run.config.task is not None:
        counts = ", ".join(f"{len(rows):,} {split}" for split, rows in run.data.splits.items())
        if run.unlabelled is not None:
            counts += f", {len(run.unlabelled):,} unlabelled"
        console.print(f"data: {run.config.data.path}, {counts}", highlight=False, markup=False)
        for note in run.data.notes:
            console.print(f"note: {note}", highlight=False, markup=False)
    console.print(
        f"{run.accelerator.num_processes} process(es) on {run.device.type}, "
        f"{'in shards (FSDP), ' if run.session.sharded else ''}precision {run.config.runtime.precision}, "
        f"run folder {run.folder}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    table = Table(title="plan", title_justify="left")
    for column, justify in (
        ("stage", "left"),
        ("on", "left"),
        ("steps", "right"),
        ("tokens", "right"),
        ("about", "right"),
        ("disk", "right"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for one in due:
        if one.done:
            table.add_row(one.stage.name, "done before", "", "", "", "")
    for work in works:
        table.add_row(
            work.name,
            work.what,
            f"{work.steps:,}" if work.steps else "",
            f"{work.tokens / 1e6:,.2f} M" if work.tokens else "",
            _duration(work.seconds) if work.seconds else "",
            f"{work.megabytes:,.0f} MB" if work.megabytes else "",
        )
    total = sum(work.seconds for work in works)
    table.add_section()
    table.add_row("all", "", "", "", _duration(total), f"{sum(work.megabytes for work in works):,.0f} MB")
    console.print(table)


def show_finding(finding: Finding) -> None:
    """A mark, what it is about, what was found, and below it what to do; text from data is never read as markup."""
    grid = Table.grid(padding=(0, 1))
    for width in (len("warning"), 24):
        grid.add_column(width=width)
    grid.add_column()
    mark = Text(finding.level.name.lower(), style=MARKS[finding.level])
    grid.add_row(mark, Text(printable(finding.subject)), Text(printable(finding.message)))
    if finding.remedy:
        grid.add_row("", "", Text(printable(f"-> {finding.remedy}"), style="italic"))
    _console().print(grid, highlight=False, markup=False)


def show_verdict(findings: Sequence[Finding]) -> None:
    """How many findings of each level there are."""
    counts = [(level, sum(finding.level is level for finding in findings)) for level in sorted(Level, reverse=True)]
    _console().print(
        Text(", ".join(f"{count} {level.name.lower()}{'s' if count != 1 else ''}" for level, count in counts[:-1]))
    )


def show_summary(run: Run, summary: dict[str, Any]) -> None:
    """The table of figures, the retention, and where the student lies."""
    console = _console()
    if "student" in summary:
        main = summary["metric"]
        names = [main, *(name for name in summary["student"]["metrics"] if name != main)][:2]
        table = Table(title=f"{escape(run.config.data.path)}: {summary['test_rows']:,} test rows", title_justify="left")
        table.add_column("model")
        for name in [f"test {name}" for name in names] + ["parameters", "MB", "ms a row"]:
            table.add_column(name, justify="right")
        for key, label in ROWS:
            if key in summary:
                figures = summary[key]
                table.add_row(
                    label,
                    *(f"{figures['metrics'][name]:.4f}" for name in names),
                    f"{figures['parameters'] / 1e6:.2f} M",
                    f"{figures['bytes'] / 1e6:.1f}",
                    f"{figures['latency_ms']:.1f}",
                )
        console.print(table)
        for note in summary["notes"]:
            console.print(f"note: {note}", highlight=False, markup=False)
        if summary.get("retention") is not None:
            console.print(
                f"the student keeps {summary['retention']:.1%} of the teacher's {main}", highlight=False, markup=False
            )
    console.print(f"student: {run.folder / 'student'}", highlight=False, markup=False, soft_wrap=True)


def show_samples(samples: Sequence[tuple[str, str]]) -> None:
    """Texts beside their augmented copies; text from data is never read as markup."""
    table = Table(title="augmented rows", title_justify="left", show_lines=True)
    table.add_column("source")
    table.add_column("augmented")
    for source, augmented in samples:
        table.add_row(Text(printable(source)), Text(printable(augmented)))
    _console().print(table)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=110)
