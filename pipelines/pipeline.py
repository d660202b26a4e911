"""The order of the stages; skipping what is done, refusing what has changed; the plan; the summary.
What a stage does is left to the file named after it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from distill.checkpoint import write_json, write_text
from distill.config import dump_config, to_plain
from distill.initialization import BUILT_IN, check_initialization
from distill.settings import UserError
from distill.students import build_student, load_body
from pipelines.augment import AugmentStage
from pipelines.card import write_card
from pipelines.evaluate import EvaluateStage
from pipelines.export import ExportStage
from pipelines.general import GeneralStage
from pipelines.lock import NAME as LOCK
from pipelines.masked_lm import MaskedLMStage
from pipelines.run import Run
from pipelines.stage import Stage, Work
from pipelines.task import TaskStage
from pipelines.teacher import TeacherStage
from pipelines.tokenizers import check_tokenizers
from pipelines.waiting import waiting

STAGES: tuple[Stage, ...] = (
    TeacherStage(),
    GeneralStage(),
    MaskedLMStage(),
    AugmentStage(),
    TaskStage(),
    EvaluateStage(),
    ExportStage(),
)
KILLED_AT_ONCE = {LOCK, ".config.yaml.part"}
"""All that a run may leave of which nothing is left."""
_log = logging.getLogger(__name__)
NAMES = tuple(stage.name for stage in STAGES)
STARTED: Mapping[str, Any] = {"key": str, "inputs": dict, "after": dict}
RESULT: Mapping[str, Any] = {"key": str, "seconds": int | float}


@dataclass(frozen=True)
class Due:
    """A stage of this call: whether it is finished, and the key under which its result will stand."""

    stage: Stage
    key: str
    inputs: dict[str, Any]
    done: bool


def prepare(run: Run, only: Collection[str] = (), redo: Collection[str] = ()) -> list[Due]:
    """Check everything a user can get wrong, before anything is written or trained.

    Raises:
        UserError: the first mistake found.
    """
    config = run.config
    for flag, names in (("--stages", only), ("--redo", redo)):
        for name in names:
            if name not in NAMES:
                raise UserError(f"{flag}: {name!r} is no stage; the stages are {', '.join(NAMES)}.")
    _refuse_foreign(run.folder)
    _refuse_unwritable(run.folder)
    stages = [stage for stage in STAGES if stage.is_on(config)]
    if not stages:
        raise UserError("general and task are both null: there is nothing to do.")
    check_tokenizers(run)
    run.layer_map  # noqa: B018  (resolved here so that its errors come before any work)
    student = build_student(
        run.student_config(),
        run.task if config.task is not None else None,
        config.student,
        run.checkpoint.config.hidden_size,
        run.config.seed,
        run.cut,
    )
    check_initialization(config.student, run.checkpoint.config, student.model.config)
    if config.student.initialization not in BUILT_IN:
        load_body(student, config.student.initialization)
    if config.task is not None and config.teacher.training is None:
        run.load_task_teacher()
    for stage in stages:
        stage.check(run)
    return _due(run, stages, only, redo)


def is_run(folder: Path) -> bool:
    """Whether a run has been here."""
    return (folder / "config.yaml").is_file()


def _refuse_unwritable(folder: Path) -> None:
    place = _nearest(folder)
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(
            f"output: {place} cannot be written by this user, or is on a read-only disk. Correct its permissions, or "
            "name another folder with --output."
        )


def _nearest(folder: Path) -> Path:
    """The folder, or the lowest one above it that is there."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return place


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output: {folder} is a file. Name a folder with --output.")
    if folder.is_dir() and {path.name for path in folder.iterdir()} - KILLED_AT_ONCE and not is_run(folder):
        raise UserError(
            f"output: {folder} is not empty and holds no run (no config.yaml). Name another folder with --output."
        )


def _due(run: Run, stages: Sequence[Stage], only: Collection[str], redo: Collection[str]) -> list[Due]:
    keys: dict[str, str] = {}
    renewed: set[str] = set()
    due: list[Due] = []
    for stage in stages:
        inputs = json.loads(json.dumps(dict(stage.depends_on(run)), sort_keys=True))
        upstream = {name: keys[name] for name in stage.reads(run.config) if name in keys}
        keys[stage.name] = hashlib.sha256(json.dumps([inputs, upstream], sort_keys=True).encode()).hexdigest()
        again = stage.name in redo or bool(renewed & set(stage.reads(run.config)))
        if again:
            renewed.add(stage.name)
        started = None if again else read_record(run.folder / stage.name / "started.json", STARTED)
        if started is not None and started["key"] != keys[stage.name]:
            raise UserError(_changed(run, stage, started, inputs, upstream))
        done = started is not None and read_record(run.folder / stage.name / "result.json", RESULT) is not None
        wanted = not only or stage.name in only
        if wanted:
            due.append(Due(stage, keys[stage.name], {"inputs": inputs, "after": upstream}, done))
        elif not done and any(stage.name in later.reads(run.config) for later in stages if later.name in only):
            raise UserError(f"--stages: {stage.name} has no result yet, and a stage you named reads it. Name it too.")
    return due


def _changed(run: Run, stage: Stage, started: dict[str, Any], inputs: dict[str, Any], upstream: dict[str, str]) -> str:
    before, now = _leaves(started["inputs"]), _leaves(inputs)
    changes = [
        f"{key}: {before.get(key, 'not set')} -> {now.get(key, 'not set')}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    changes += [f"the stage {name} before it" for name in upstream if started["after"].get(name) != upstream[name]]
    shown = "; ".join(change if len(change) < 120 else change[:117] + "..." for change in changes[:4])
    return (
        f"output: {run.folder} already holds the stage {stage.name}, made with other inputs ({shown}). "
        f"Add --redo {stage.name} to make it and what follows anew, or name another folder with --output."
    )


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    leaves: dict[str, Any] = {}
    for key, item in value.items():
        leaves |= _leaves(item, f"{prefix}.{key}" if prefix else key)
    return leaves


def plan(run: Run, due: Sequence[Due]) -> list[Work]:
    """What the stages that are not finished would do.

    Raises:
        UserError: the disk is too small for it.
    """
    works = [work for one in due if not one.done for work in one.stage.plan(run)]
    # While one is written, those it follows are still there.
    checkpoints = run.config.runtime.keep_checkpoints + 1
    needed = max((work.megabytes for work in works), default=0) * checkpoints
    needed += sum(work.megabytes / 4 for work in works)
    parent = _nearest(run.folder)
    free = shutil.disk_usage(parent).free / 1e6
    if needed > free:
        raise UserError(
            f"output: {parent} has {free:,.0f} MB free, the run needs about {needed:,.0f} MB. Free some, or name a "
            "folder on another disk with --output."
        )
    return works


def run_stages(run: Run, due: Sequence[Due]) -> dict[str, Any]:
    """Run what is not finished, in order; returns the summary, also written to summary.json."""
    if run.is_main:
        run.folder.mkdir(parents=True, exist_ok=True)
    run.lock.take()
    if run.is_main:
        write_text(run.folder / "config.yaml", dump_config(run.config))
    run.accelerator.wait_for_everyone()
    run.session.tracker.start(to_plain(run.config), run.config.project)
    for one in due:
        folder = run.folder / one.stage.name
        if one.done:
            run.say(f"{one.stage.name}: done before, skipped")
            continue
        if run.is_main:
            _begin(folder, one)
        run.accelerator.wait_for_everyone()
        run.session.interruption.raise_if_requested()
        # A stage draws the same numbers whether those before it ran in this process or long ago.
        set_seed(run.config.seed)
        began = time.monotonic()
        with waiting(one.stage.name, run.config.runtime.process_timeout_seconds):
            figures = one.stage.run(run)
            run.accelerator.wait_for_everyone()
        if run.is_main:
            result = {"key": one.key, "seconds": time.monotonic() - began, **figures}
            write_json(folder / "result.json", result)
            run.say(f"{one.stage.name}: {result['seconds']:.0f} s")
    summary = _summarise(run)
    run.session.tracker.finish(summary)
    return summary


def _begin(folder: Path, one: Due) -> None:
    """Keep what an interrupted stage left under the same key; clear what another one left."""
    started = read_record(folder / "started.json", STARTED)
    if started is None or started["key"] != one.key or (folder / "result.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "started.json", {"key": one.key, **one.inputs})


def _summarise(run: Run) -> dict[str, Any]:
    results = {name: read_record(run.folder / name / "result.json", RESULT) for name in NAMES}
    summary: dict[str, Any] = {}
    if (evaluated := results["evaluate"]) is not None:
        for who in ("teacher", "student", "undistilled_student", "retention"):
            if who in evaluated:
                summary[who] = evaluated[who]
        summary["metric"] = run.metric
        summary["test_rows"] = len(run.data.splits["test"])
        summary["notes"] = list(run.data.notes)
        if "machine" in evaluated:
            summary["machine"] = evaluated["machine"]
    summary["layer_map"] = run.layer_map.describe()
    summary["seconds"] = {name: result["seconds"] for name, result in results.items() if result is not None}
    if run.is_main:
        write_json(run.folder / "summary.json", summary)
        write_card(run.config, run.folder)  # here, so that it follows whichever stage was done again
    return summary


def read_record(path: Path, kinds: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a stage wrote of itself; None where it is not there or damaged, that is not JSON or without these keys."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict) and all(isinstance(value.get(key), kind) for key, kind in kinds.items()):
        return value
    _log.warning("%s is damaged: it cannot be read. Its stage is done again.", path)
    return None
