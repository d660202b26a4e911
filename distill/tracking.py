"""Where figures go: metrics.jsonl always, W&B and others through Accelerate. The only file that knows the trackers.
What is measured is left to its callers."""

from __future__ import annotations

import importlib.util
import json
import netrc
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from accelerate import Accelerator

from distill.checkpoint import write_text
from distill.settings import UserError

PACKAGES = {
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "mlflow": "mlflow",
    "comet_ml": "comet_ml",
    "aim": "aim",
    "clearml": "clearml",
    "dvclive": "dvclive",
    "swanlab": "swanlab",
    "trackio": "trackio",
}
"""Trackers that Accelerate knows, and the package each needs."""


def check_trackers(names: list[str]) -> None:
    """Raises UserError for an unknown tracker or one that is not installed."""
    for name in names:
        if name not in PACKAGES:
            raise UserError(f"tracking: {name!r} is no tracker; use {', '.join(PACKAGES)}.")
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(f"tracking: {name} is not installed; run `pip install {PACKAGES[name]}` or leave it out.")


class Tracker:
    """Logs figures of all stages on one line of steps.

    metrics.jsonl: one JSON object a row, {"stage", "step", "total_step", "time", "train/attention": ...}; step counts
    within the stage. Steps that a killed run repeats after its last checkpoint come twice; the later row counts.
    Trackers see "task.intermediate/train/attention" against a step that grows over the stages.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, names: list[str]) -> None:
        self.accelerator, self.folder, self.names = accelerator, folder, names
        self.path = folder / "metrics.jsonl"
        self.offset = self.total = 0
        self.begun: dict[str, int] = {}

    def start(self, config: Mapping[str, Any], project: str) -> None:
        """Open the trackers, once everything is checked; a run that goes on keeps its W&B id and its step."""
        if self.accelerator.is_main_process:
            for row in _read_whole_rows(self.path):
                self.total = max(self.total, row["total_step"])
                self.begun[row["stage"]] = row["total_step"] - row["step"]
        if self.names:
            # Accelerate opens trackers on the main process alone; the others must not write an id of their own.
            options = _init_options(self.names, self.folder) if self.accelerator.is_main_process else {}
            self.accelerator.init_trackers(project, config=_flat(config), init_kwargs=options)

    def begin_stage(self, stage: str, done: int) -> None:
        """Count steps on from the last one logged; those of a stage that goes on after `done` steps from its own."""
        self.offset = self.begun.get(stage, self.total) if done else self.total

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Write one row; figures that are not finite become null in the file."""
        if not self.accelerator.is_main_process:
            return
        self.total = max(self.total, self.offset + step)
        row: dict[str, Any] = {"stage": stage, "step": step, "total_step": self.offset + step, "time": time.time()}
        row |= {
            name: value if value == value and abs(value) != float("inf") else None for name, value in values.items()
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.names:
            self.accelerator.log({f"{stage}/{name}": value for name, value in values.items()}, step=self.offset + step)

    def log_skipped(self, stage: str, step: int, rows: Sequence[int], wrong: Mapping[str, float]) -> Path:
        """Write the rows of a step that was not taken, and what was not finite, to skipped_steps.jsonl; its path.

        Rows are numbered from 0 as the stage trains on them: the training split and the augmented rows behind it, or
        the sequences of the corpus.
        """
        path = self.folder / "skipped_steps.jsonl"
        if self.accelerator.is_main_process:
            row = {
                "stage": stage,
                "step": step,
                "rows": list(rows),
                "not_finite": {k: str(v) for k, v in wrong.items()},
            }
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return path

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Hand over the run's summary and close the trackers."""
        if not self.names:
            return
        if "wandb" in self.names and self.accelerator.is_main_process:
            self.accelerator.get_tracker("wandb", unwrap=True).summary.update(_flat(summary))
        self.accelerator.end_training()


def _init_options(names: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    options: dict[str, dict[str, Any]] = {}
    if "wandb" in names:
        identity = folder / "wandb-run-id"
        if not identity.exists():
            write_text(identity, os.urandom(8).hex())
        options["wandb"] = {
            "dir": str(folder),
            "name": folder.name,
            "id": identity.read_text(encoding="utf-8"),
            "resume": "allow",
            "mode": os.environ.get("WANDB_MODE") or ("online" if _has_wandb_login() else "offline"),
        }
    return options


def _has_wandb_login() -> bool:
    """A key in the environment, or one that `wandb login` left in .netrc; never prompts."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc().authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _read_whole_rows(path: Path) -> list[dict[str, Any]]:
    """The rows so far; one that was cut off by a kill is removed from the file."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_text(path, whole)
    return [json.loads(row) for row in whole.splitlines()]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
