"""Claims about processes: two do what one does, the launcher's promise is kept, a signal costs nothing.
What is launched or stopped runs in processes of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.builders import FEW_STEPS, ROOT, TINY, finished_run, succeed

# Dropout draws from each process's own stream (so the teacher is one made before), and bf16 would hide differences.
SAME = (*FEW_STEPS, "student.dropout=0", "evaluate.undistilled=false", "teacher.training=null")


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE", "RANK", "WORLD"))}
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def _script(*arguments: str | Path, launch: tuple[str, ...] = ()) -> list[str]:
    start = [sys.executable, "-m", "accelerate.commands.launch", *launch] if launch else [sys.executable]
    return [*start, str(ROOT / "scripts" / "distill.py"), *map(str, arguments)]


def _run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=_environment(), capture_output=True, text=True, timeout=300)


def _largest_difference(one: Path, other: Path) -> float:
    first, second = load_file(one / "student" / "model.safetensors"), load_file(other / "student" / "model.safetensors")
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_two_processes_give_the_student_of_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    same = (*SAME, f"teacher.model={finished_run() / 'teacher' / 'model'}", "augment.masked_lm=tiny-random")
    succeed(TINY, *same, "--output", one)
    launch = ("--cpu", "--num_processes", "2")
    together = _run(_script(TINY, *same, "--output", two, launch=launch), tmp_path)
    assert together.returncode == 0, together.stderr[-3000:]
    assert "2 process(es)" in together.stdout
    assert together.stdout.count("export:") == 1  # the second process says nothing
    files = [sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()) for run in (one, two)]
    assert files[0] == files[1]
    augmented = [path for path in files[0] if path.startswith("augment/data/")]
    assert augmented
    assert all((one / path).read_bytes() == (two / path).read_bytes() for path in augmented)
    assert _largest_difference(one, two) < 2e-5


def test_a_run_stopped_by_a_signal_goes_on_to_the_same_student(tmp_path: Path) -> None:
    # Dropout stays on: the random state must come back too.
    settings = (*FEW_STEPS, "teacher.training.max_steps=40", "evaluate.undistilled=false")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    succeed(TINY, *settings, "--output", whole)

    process = subprocess.Popen(
        _script(TINY, *settings, "--output", stopped),
        cwd=tmp_path,
        env=_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = stopped / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors[-3000:]
    assert "SIGTERM" in errors
    assert list((stopped / "teacher" / "checkpoints").glob("checkpoint-*")), "no checkpoint was saved"

    succeed(TINY, *settings, "--output", stopped)
    assert _largest_difference(whole, stopped) == 0


@pytest.mark.parametrize("launch", [(), ("--cpu", "--quiet")])
def test_a_mistake_is_told_once_from_any_folder(launch: tuple[str, ...], tmp_path: Path) -> None:
    outcome = _run(_script(TINY, "student.widht=3", launch=launch), tmp_path)
    # accelerate's launcher turns every failure into 1.
    assert outcome.returncode == (1 if launch else 2)
    assert outcome.stderr.count("error: student.widht: there is no such setting; did you mean student.width?") == 1
