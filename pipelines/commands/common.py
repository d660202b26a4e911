"""What several commands share: arguments, reading lists, opening a config, settling the libraries.
Everything heavy is imported inside of the functions, so that --help answers at once."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

ConfigArgument = Annotated[Path, typer.Argument(help="YAML file, for instance configs/bbc_news.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that replace the file's, for instance seed=1."),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, for instance runs/bbc_news.")]


def require_student(folder: Path) -> None:
    """Raises UserError where a folder is no run's, or its student is not finished."""
    from distill.settings import UserError

    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"{folder}: this is no run folder (no config.yaml in it). Give the folder a run was written to."
        )
    if not any((folder / stage / "result.json").is_file() for stage in ("task", "general")):
        raise UserError(
            f"{folder}: this run has no student yet. Finish it first: tinybert run {folder / 'config.yaml'}"
        )


def split_names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def split_numbers(flag: str, text: str) -> tuple[int, ...]:
    from distill.settings import UserError

    names = split_names(text)
    if not all(name.isdecimal() and int(name) for name in names):
        raise UserError(f"{flag}: {text!r} is not a list of positive numbers, such as 16,64,128.")
    return tuple(int(name) for name in names)


def load(path: Path, overrides: list[str], output: str | None) -> Any:
    settle()
    from distill.config import load_config

    config = load_config(path, overrides)
    return config if output is None else replace(config, output=output)


def settle() -> None:
    """Threads and messages of the libraries, before they are used."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that spin while they wait make a step several times slower when anything else uses a core (GNU OpenMP's
    # default); read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
