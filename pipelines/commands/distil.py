"""Commands that take a config: run its stages, see what they would do.
What a stage does is left to its own file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.common import ConfigArgument, Overrides, RunArgument, load, split_names


def run(
    config: ConfigArgument,
    overrides: Overrides = None,
    output: Annotated[str | None, typer.Option(help="Run folder; replaces the config's output.")] = None,
    stages: Annotated[
        str | None,
        typer.Option(
            help="Run only these, comma-separated: teacher, general, masked_lm, augment, task, evaluate, export."
        ),
    ] = None,
    redo: Annotated[
        list[str] | None, typer.Option(help="Do a finished stage, and what follows from it, again. May be repeated.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan with its cost and what `doctor` finds; write nothing.")
    ] = False,
) -> None:
    """Run the stages of a distillation: teacher, general, augment, task, evaluate, export.

    Finished stages are skipped while their settings and inputs are unchanged; a stopped stage goes on from its last
    checkpoint. The student lies in OUTPUT/student, the figures in OUTPUT/summary.json.
    """
    run_config(config, overrides or [], output, split_names(stages), split_names(",".join(redo or [])), dry_run)


def augment(
    config: ConfigArgument,
    overrides: Overrides = None,
    show: Annotated[int, typer.Option(min=1, help="How many augmented rows to show.")] = 20,
) -> None:
    """Show augmented training rows beside their sources, the replaced words marked; write nothing."""
    loaded = load(config, overrides or [], None)

    from pipelines import display
    from pipelines.augment import samples
    from pipelines.run import close_run, open_run

    run = open_run(loaded)
    display.show_samples(samples(run, show))
    close_run(run)


def doctor(
    config: ConfigArgument,
    overrides: Overrides = None,
    output: Annotated[str | None, typer.Option(help="Run folder; replaces the config's output.")] = None,
) -> None:
    """Check teacher, tokenizer, labels, data and losses before a run, each finding with a remedy; write nothing.

    The same as `run --dry-run`. Ends with 2 where a finding is an error.
    """
    run_config(config, overrides or [], output, [], [], dry_run=True)


def evaluate(folder: RunArgument) -> None:
    """Evaluate a run's teacher and students again, on its config's test rows."""
    run_config(folder / "config.yaml", [], str(folder), ["evaluate"], ["evaluate"], False)


def run_config(
    path: Path, overrides: list[str], output: str | None, stages: list[str], redo: list[str], dry_run: bool
) -> None:
    """Check, plan and run the stages of a config, or print what `doctor` finds."""
    config = load(path, overrides, output)

    from pipelines import display
    from pipelines.doctor import Level, examine
    from pipelines.pipeline import is_run, plan, prepare, run_stages
    from pipelines.run import close_run, open_run
    from pipelines.waiting import waiting

    run = open_run(config)
    findings = []
    patience = waiting("the run", config.runtime.process_timeout_seconds)  # a stage names itself
    with run.session.interruption.watched(), run.lock, patience:
        if not dry_run and is_run(run.folder):
            run.lock.take()  # before it is read what is done there; a new folder is made and locked when all is checked
        due = prepare(run, stages, redo)
        works = plan(run, due)
        if run.is_main:
            display.show_plan(run, due, works)
        if dry_run:
            for finding in examine(run, due):
                findings.append(finding)
                if run.is_main:
                    display.show_finding(finding)
            if run.is_main:
                display.show_verdict(findings)
        else:
            summary = run_stages(run, due)
            if run.is_main:
                display.show_summary(run, summary)
    close_run(run)
    if any(finding.level is Level.ERROR for finding in findings):
        raise typer.Exit(2)
