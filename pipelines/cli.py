"""The commands. `tinybert run` and scripts/distill.py are the same; what they run is pipeline.py's."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Distil a BERT-family teacher into a TinyBERT student that plain transformers loads.",
)

ConfigArgument = Annotated[Path, typer.Argument(help="YAML file, for instance configs/bbc_news.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that replace the file's, for instance seed=1."),
]


@app.command()
def run(
    config: ConfigArgument,
    overrides: Overrides = None,
    output: Annotated[str | None, typer.Option(help="Run folder; replaces the config's output.")] = None,
    stages: Annotated[
        str | None,
        typer.Option(help="Run only these, comma-separated: teacher, general, augment, task, evaluate, export."),
    ] = None,
    redo: Annotated[
        list[str] | None, typer.Option(help="Do a finished stage, and what follows from it, again. May be repeated.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the plan with its cost; write nothing.")
    ] = False,
) -> None:
    """Run the stages of a distillation: teacher, general, augment, task, evaluate, export.

    Finished stages are skipped while their settings and inputs are unchanged; a stopped stage goes on from its last
    checkpoint. The student lies in OUTPUT/student, the figures in OUTPUT/summary.json.
    """
    _run(config, overrides or [], output, _names(stages), _names(",".join(redo or [])), dry_run)


@app.command()
def evaluate(folder: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Evaluate a run's teacher and students again, on its config's test rows."""
    _run(folder / "config.yaml", [], str(folder), ["evaluate"], ["evaluate"], False)


@app.command()
def export(folder: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write a run's student folder again and check it."""
    _run(folder / "config.yaml", [], str(folder), ["export"], ["export"], False)


def main() -> None:
    """The `tinybert` command."""
    _exit_with(app)


def run_main() -> None:
    """scripts/distill.py: `tinybert run` without its name."""
    from pipelines.launch import start_missing_processes

    start_missing_processes(sys.argv[0], sys.argv[1:])
    single = typer.Typer(add_completion=False, rich_markup_mode="rich")
    single.command()(run)
    _exit_with(single)


def _exit_with(command: Callable[[], Any]) -> None:
    """0 done, 2 the user's input is wrong, 130 or 143 after a signal, 1 anything else."""
    from distill.interruption import Interrupted
    from distill.settings import UserError

    first = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        command()
    except UserError as error:
        if first:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        if first:
            print(str(stop), file=sys.stderr)
        sys.exit(stop.status)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _run(
    path: Path, overrides: list[str], output: str | None, stages: list[str], redo: list[str], dry_run: bool
) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Imported here, so that --help and a misspelt key answer at once.
    from distill.config import load_config

    config = load_config(path, overrides)
    if output is not None:
        config = replace(config, output=output)

    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from distill.interruption import Interruption
    from distill.tracking import Tracker, check_trackers
    from distill.training import Session
    from pipelines import display
    from pipelines.launch import cpu_threads
    from pipelines.pipeline import plan, prepare, run_stages
    from pipelines.run import Run

    _quieten()
    check_trackers(config.tracking)
    torch.set_num_threads(config.runtime.cpu_threads or cpu_threads())
    folder = Path(config.output)
    config = _with_precision(config, folder)
    accelerator = Accelerator(
        mixed_precision="bf16" if config.runtime.precision == "bf16" else "no",
        log_with=list(config.tracking) or None,
        project_dir=str(folder),
    )
    set_seed(config.seed)
    interruption = Interruption()
    from distill.config import to_plain

    with interruption.watched():
        # The tracker opens files and runs: only once everything is checked.
        checked = Run(config, folder, Session(accelerator, None, interruption))  # type: ignore[arg-type]
        due = prepare(checked, stages, redo)
        works = plan(checked, due)
        if accelerator.is_main_process:
            display.show_plan(checked, due, works)
        if dry_run:
            return
        folder.mkdir(parents=True, exist_ok=True)
        tracker = Tracker(accelerator, folder, list(config.tracking), to_plain(config), config.project)
        checked.session = Session(accelerator, tracker, interruption)
        summary = run_stages(checked, due)
        tracker.finish(summary)
        if accelerator.is_main_process:
            display.show_summary(checked, summary)
    if accelerator.num_processes > 1:
        torch.distributed.destroy_process_group()


def _with_precision(config: Any, folder: Path) -> Any:
    """Settle runtime.precision=auto: what this run already uses, what the launcher was told, or what is measured."""
    from distill.config import load_config
    from pipelines.run import measured_precision

    if config.runtime.precision != "auto":
        return config
    precision: str | None = None
    if (folder / "config.yaml").is_file():
        precision = load_config(folder / "config.yaml").runtime.precision
    if precision in (None, "auto") and os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16":
        precision = "bf16"
    if precision in (None, "auto"):
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list

        state = PartialState()
        measured = [measured_precision(state.device) if state.is_main_process else None]
        precision = broadcast_object_list(measured)[0] if state.num_processes > 1 else measured[0]
    return replace(config, runtime=replace(config.runtime, precision=precision))


def _quieten() -> None:
    """Libraries speak where something is wrong; the run itself says what it does."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
