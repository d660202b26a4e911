"""Runs that die: started, killed, starved of disk, started again, and compared with one that nothing happened to.
The faults themselves and what is claimed are test_faults.py's."""

from __future__ import annotations

import faulthandler
import gc
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from distill.checkpoint import damage_of
from pipelines import cli
from tests.builders import TINY

STAGES = ("teacher", "general", "masked_lm", "augment", "task", "evaluate", "export")
FIGURES = ("kills", "resumed", "different_weights", "damaged", "recovered", "disk_full", "lost_bytes")
counted: Counter[str] = Counter()
"""What was seen to happen, by the names in FIGURES; printed as the last line of a run of the tests."""

# Arrow's allocator would start a thread in the process that is forked.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
# Processes are forked from one that has imported everything and done nothing: importing takes longer than the run.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["pipelines.pipeline", "pipelines.run", "pipelines.display", "pipelines.doctor"])


def settings(corpus: Path) -> list[str]:
    """A run of seconds in which much can go wrong: every stage, a streamed corpus, dropout, balanced losses, cached
    logits, a checkpoint every other step, the best weights chosen again and again."""
    often = "save_every_steps: 2, log_every_steps: 1"
    chosen = f"{often}, evaluate_every_steps: 4"
    return [
        TINY,
        "runtime.precision=fp32",
        "teacher.adapt_masked_lm={max_steps: 8, max_length: 32, batch_size: 8, " + chosen + "}",
        "teacher.training={max_steps: 14, batch_size: 16, learning_rate: 3e-3, " + chosen + "}",
        f"general.corpus={{path: text, data_files: {corpus}}}",
        "general.streaming=true",
        "general.training={max_steps: 14, batch_size: 8, " + often + "}",
        "augment.copies=1",
        "task.intermediate={max_steps: 12, batch_size: 16, learning_rate: 1e-3, balance: gradient, "
        "measure_gradients_every_steps: 3, " + chosen + "}",
        "task.logits={max_steps: 26, batch_size: 16, learning_rate: 1e-3, " + chosen + "}",
        "evaluate.undistilled_training={max_steps: 8, batch_size: 16, learning_rate: 1e-3, " + chosen + "}",
    ]


class Started:
    """A run in a process of its own; what it prints goes into LOG."""

    def __init__(self, arguments: Sequence[str], folder: Path) -> None:
        self.folder = folder
        self.log = folder.with_name(f"{folder.name}.log")
        command = ["scripts/distill.py", *arguments, "--output", str(folder)]
        self.process: BaseProcess = _processes.Process(target=_run, args=(command, str(self.log)), daemon=True)
        self.process.start()
        _started.append(self.process)

    def wait_for(self, happened: Callable[[], bool], seconds: float = 240) -> bool:
        """Whether it happened while the run lived."""
        deadline = time.monotonic() + seconds
        while self.process.is_alive() and time.monotonic() < deadline:
            if happened():
                return True
            time.sleep(0.001)
        return False

    def wait_for_stage(self, stage: str, work: float) -> bool:
        """Until the stage has worked for so many seconds; False where the run ended before.

        Of the processor's time: by the clock, a moment would fall elsewhere each time the machine is busy.
        """
        if not self.wait_for((self.folder / stage / "started.json").exists):
            return False
        began = self.work()
        return self.wait_for(lambda: self.work() - began >= work)

    def work(self) -> float:
        """Seconds of the processor so far."""
        try:
            times = psutil.Process(self.process.pid).cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return times.user + times.system

    def work_of_stages(self) -> dict[str, float]:
        """Let the run end; seconds of the processor that each stage took."""
        began: dict[str, float] = {}
        took: dict[str, float] = {}
        while self.process.is_alive():
            work = self.work()
            for stage in STAGES if work else ():
                if stage not in began and (self.folder / stage / "started.json").exists():
                    began[stage] = work
                if stage in began and (stage not in took or not (self.folder / stage / "result.json").exists()):
                    took[stage] = work - began[stage]
            time.sleep(0.005)
        self.end()
        return took

    def kill(self) -> bool:
        """SIGKILL; whether it came before the end."""
        self.process.kill()
        return self.end() == -signal.SIGKILL

    def end(self) -> int | None:
        self.process.join(timeout=600)
        return self.process.exitcode

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


def end_all() -> None:
    """Of what a test that failed has left running."""
    while _started:
        process = _started.pop()
        process.kill()
        process.join()


_started: list[BaseProcess] = []


def _run(command: list[str], log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = command
    faulthandler.dump_traceback_later(250, exit=True)  # a run that hangs says where
    gc.freeze()  # what was imported need not be searched for garbage after every training
    cli.run_main()


def finish(arguments: Sequence[str], folder: Path) -> Started:
    """Start a run and let it end."""
    started = Started(arguments, folder)
    started.end()
    return started


def outputs(folder: Path) -> dict[str, str]:
    """sha256 of all weights and augmented rows; of other files their presence, so that nothing is left behind."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        exact = path.suffix in (".safetensors", ".parquet")
        found[str(path.relative_to(folder))] = _sha256(path) if exact else "there"
    return found


def curve(folder: Path) -> dict[tuple[str, int], dict[str, float]]:
    """The last row of each step in metrics.jsonl, without what is a matter of time or of chance measurements."""
    rows = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        kept = {name: value for name, value in row.items() if name.startswith(("train/", "validation/"))}
        kept.pop("train/tokens_per_second", None)
        rows.setdefault((row["stage"], row["step"]), {}).update(kept)
    return rows


def saved(folder: Path) -> dict[str, tuple[int, str]]:
    """What must not be lost: bytes and sha256 of the files of finished stages, and of the newest whole checkpoint of
    each training under its training's name."""
    found: dict[str, tuple[int, str]] = {}
    for stage in STAGES:
        if (folder / stage / "result.json").is_file():
            for path in (folder / stage).rglob("*"):
                if path.is_file():
                    found[str(path.relative_to(folder))] = (path.stat().st_size, _sha256(path))
        for checkpoints in (folder / stage).rglob("checkpoints"):
            newest = newest_whole(checkpoints)
            if newest is not None:
                size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
                found[str(checkpoints.relative_to(folder))] = (size, newest.name)
    return found


def newest_whole(checkpoints: Path) -> Path | None:
    whole = [path for path in checkpoints.glob("checkpoint-*") if damage_of(path) is None]
    return max(whole, default=None)


def lost_bytes(before: dict[str, tuple[int, str]], folder: Path) -> int:
    """Bytes that were saved before a fault and are not there after it. A checkpoint may give way to a later one, and
    those of a training to its result."""
    after, lost = saved(folder), 0
    for name, (size, content) in before.items():
        if not name.endswith("checkpoints"):
            lost += size * (after.get(name, (0, ""))[1] != content)
            continue
        later = after.get(name, (0, ""))[1] >= content
        ended = (folder / name.split("/")[0] / "result.json").is_file() or _phase_ended(folder, name)
        lost += size * (not later and not ended)
    return lost


def _phase_ended(folder: Path, checkpoints: str) -> bool:
    """Whether what the training made is there: the stage clears the checkpoints just before its result.json."""
    made = {
        "teacher": "model",
        "general": "student",
        "masked_lm": "model",
        "task": "student",
        "evaluate": "undistilled_student",
    }
    stage = checkpoints.split("/")[0]
    return not (folder / checkpoints).exists() and (folder / stage / made[stage] / "model.safetensors").is_file()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
