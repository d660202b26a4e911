"""Claims about runs that are killed, whose checkpoints are damaged, whose disk is full: started again they end with
the very weights of the run that nothing happened to, and nothing that was saved is lost. `make test-faults`."""

from __future__ import annotations

import contextlib
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distill import tiny
from distill.checkpoint import MANIFEST, STATE
from tests.fault_runs import (
    STAGES,
    Started,
    counted,
    curve,
    end_all,
    finish,
    lost_bytes,
    newest_whole,
    outputs,
    saved,
    settings,
)

pytestmark = pytest.mark.faults

KILLS, SEED = 30, 20260101


@dataclass(frozen=True)
class Whole:
    """The run that nothing happened to."""

    arguments: list[str]
    folder: Path
    outputs: dict[str, str]
    work: dict[str, float]
    """Seconds of the processor by stage."""

    def require_same(self, folder: Path) -> None:
        """Counts a run that ended otherwise, and fails."""
        found = outputs(folder)
        same = found == self.outputs and curve(folder) == curve(self.folder)
        counted["different_weights"] += not same
        different = {name for name in found.keys() | self.outputs.keys() if found.get(name) != self.outputs.get(name)}
        assert not different
        assert same, "the logged figures differ"


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    yield
    end_all()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    corpus = folder / "corpus.txt"
    texts = tiny.load()["train"]["text"][:]
    corpus.write_text("\n".join(random.Random(0).choices(texts, k=600)), encoding="utf-8")
    arguments = settings(corpus)
    run = Started(arguments, folder / "run")
    work = run.work_of_stages()
    assert run.process.exitcode == 0, run.said()[-3000:]
    return Whole(arguments, run.folder, outputs(run.folder), work)


def test_a_run_that_nothing_happens_to_ends_the_same_twice(whole: Whole, tmp_path: Path) -> None:
    """Else the others would mean nothing."""
    assert finish(whole.arguments, tmp_path / "run").process.exitcode == 0
    whole.require_same(tmp_path / "run")


# ---- kills

MOMENTS = [(STAGES[number % len(STAGES)], random.Random(SEED + number).random()) for number in range(KILLS)]
"""A stage, and a share of the work that it is."""


@pytest.mark.parametrize("number", range(KILLS), ids=lambda number: f"{MOMENTS[number][0]}-{MOMENTS[number][1]:.2f}")
def test_a_killed_run_that_is_started_again_ends_with_the_same_weights(
    number: int, whole: Whole, tmp_path: Path
) -> None:
    stage, share = MOMENTS[number]
    for attempt in range(5):  # a moment may fall behind the end of the run
        folder = tmp_path / f"attempt-{attempt}"
        started = Started(whole.arguments, folder)
        begun = started.wait_for_stage(stage, whole.work[stage] * share / (1 + attempt))
        before = saved(folder)
        if begun and started.kill():
            break
    else:
        pytest.fail(f"it was never killed: {started.said()[-3000:]}")
    counted["kills"] += 1
    counted["lost_bytes"] += (lost := lost_bytes(before, folder))
    assert lost == 0
    resumed = finish(whole.arguments, folder)
    assert resumed.process.exitcode == 0, resumed.said()[-3000:]
    counted["resumed"] += 1
    whole.require_same(folder)


# ---- damaged checkpoints


@dataclass(frozen=True)
class Killed:
    """Runs killed with two checkpoints each, in the training that is named; to be copied."""

    in_teacher: Path
    in_intermediate: Path
    in_logits: Path


@pytest.fixture(scope="module")
def killed(whole: Whole, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    def kill_in(*training: str) -> Path:
        folder = tmp_path_factory.mktemp("killed") / "run"
        started = Started(whole.arguments, folder)
        checkpoints = folder.joinpath(*training, "checkpoints")
        assert started.wait_for(lambda: len(list(checkpoints.glob("checkpoint-*"))) >= 2), started.said()[-3000:]
        assert started.kill()
        return folder

    return Killed(kill_in("teacher"), kill_in("task", "intermediate"), kill_in("task", "logits"))


def _newest(folder: Path) -> Path:
    (checkpoints,) = [path for path in folder.rglob("checkpoints") if "intermediate" not in str(path)] or list(
        folder.rglob("checkpoints")
    )
    newest = newest_whole(checkpoints)
    assert newest is not None
    return newest


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0x10
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _all_optimizers(folder: Path) -> None:
    for path in folder.rglob("optimizer.bin"):
        _flip(path)


def _best(folder: Path) -> Path:
    return max(folder.rglob("best-*.safetensors"))


DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "model truncated": ("in_teacher", lambda run: _truncate(_newest(run) / "model.safetensors"), "model.safetensors"),
    "optimizer, a bit": ("in_teacher", lambda run: _flip(_newest(run) / "optimizer.bin"), "optimizer.bin"),
    "random state gone": ("in_teacher", lambda run: (_newest(run) / "random_states_0.pkl").unlink(), "random_states"),
    "state empty": ("in_teacher", lambda run: _empty(_newest(run) / STATE), "state.json has 0 bytes"),
    "manifest of garbage": (
        "in_teacher",
        lambda run: (_newest(run) / MANIFEST).write_bytes(bytes(range(256))),
        "manifest.json cannot be read",
    ),
    "manifest gone": ("in_teacher", lambda run: (_newest(run) / MANIFEST).unlink(), "manifest.json is missing"),
    "state of another step": ("in_intermediate", lambda run: _flip(_newest(run) / STATE), "state.json has other"),
    "best weights, a bit": ("in_intermediate", lambda run: _flip(_best(run)), "best-"),
    "both of them": ("in_intermediate", _all_optimizers, "this training begins anew"),
    "emptied": (
        "in_logits",
        lambda run: [file.unlink() for file in _newest(run).iterdir()],
        "manifest.json is missing",
    ),
    "weights of the phase before": (
        "in_logits",
        lambda run: _truncate(run / "task" / "intermediate" / "student.safetensors"),
        "student.safetensors is damaged",
    ),
    "result of the phase before": (
        "in_logits",
        lambda run: _truncate(run / "task" / "intermediate" / "student.json"),
        "student.json cannot be read",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_weights_are_the_same(
    case: str, whole: Whole, killed: Killed, tmp_path: Path
) -> None:
    where, damage, named = DAMAGE[case]
    folder = shutil.copytree(getattr(killed, where), tmp_path / "run")
    damage(folder)
    counted["damaged"] += 1
    resumed = finish(whole.arguments, folder)
    assert resumed.process.exitcode == 0, resumed.said()[-3000:]
    assert "is damaged" in resumed.said()
    assert named in resumed.said()
    whole.require_same(folder)
    counted["recovered"] += 1


# ---- full disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A file system of 32 MB, where this user may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        yield None
        return
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def _keep_full(disk: Path, left: int, run: Started) -> Path:
    """Take all of a disk but `left` bytes, and what is freed of it until the run has ended."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        while run.process.is_alive():
            with contextlib.suppress(OSError):
                file.write(bytes(max(0, shutil.disk_usage(disk).free - left)))
            time.sleep(0.002)
    return ballast


POINTS = [
    ("teacher", 0.5, "disk", 64 << 10),
    ("general", 0.6, "disk", 0),
    ("augment", 0.2, "disk", 4 << 10),
    ("task", 0.5, "disk", 64 << 10),
    ("evaluate", 0.2, "disk", 4 << 10),
    ("masked_lm", 0.5, "file", 16 << 10),
    ("evaluate", 0.3, "file", 16 << 10),
]
"""A stage, a share of its work; the disk left with so many bytes, or files limited to so many."""


@pytest.mark.parametrize("point", POINTS, ids=lambda point: f"{point[0]}-{point[2]}")
def test_a_full_disk_ends_in_a_message_and_loses_nothing(
    point: tuple[str, float, str, int], whole: Whole, small_disk: Path | None, tmp_path: Path
) -> None:
    stage, share, how, left = point
    limited = how == "file" or small_disk is None  # a limit on the size of files stands in for a disk
    folder = (tmp_path if limited else small_disk) / "run"
    ballast = None
    started = Started(whole.arguments, folder)
    assert started.wait_for_stage(stage, whole.work[stage] * share), started.said()[-3000:]
    before = saved(folder)
    if limited:
        hard = resource.prlimit(started.process.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(started.process.pid, resource.RLIMIT_FSIZE, (16 << 10, hard))
    else:
        ballast = _keep_full(small_disk, left, started)
    assert started.end() == 1, started.said()[-3000:]
    said = started.said()
    assert "could not be written: " in said, said[-3000:]
    assert "Free some space there and start the same command again" in said
    assert "Traceback" not in said
    counted["disk_full"] += 1
    counted["lost_bytes"] += (lost := lost_bytes(before, folder))
    assert lost == 0
    if ballast is not None:
        ballast.unlink()
    resumed = finish(whole.arguments, folder)
    assert resumed.process.exitcode == 0, resumed.said()[-3000:]
    whole.require_same(folder)
