"""Claims about processes: two do what one does, the launcher's promise is kept, a signal costs nothing.
What is launched or stopped runs in processes of its own."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from tests.builders import FEW_STEPS, ROOT, TINY, finished_run, run_cli, succeed
from tests.fault_runs import counted, newest_whole

# Dropout draws from each process's own stream (so the teacher is one made before), and bf16 would hide differences.
SAME = (*FEW_STEPS, "student.dropout=0", "evaluate.undistilled=false", "teacher.training=null")
TWO = ("--cpu", "--num_processes", "2")
# On a machine without accelerators its launcher starts both, and they find the CPU.
SHARDS = (
    "--config_file",
    str(ROOT / "configs/accelerate/fsdp.yaml"),
    "--num_processes",
    "2",
    "--main_process_port",
    "0",
)


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE", "RANK", "WORLD"))}
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _script(*arguments: str | Path, launch: tuple[str, ...] = ()) -> list[str]:
    start = [sys.executable, "-m", "accelerate.commands.launch", *launch] if launch else [sys.executable]
    return [*start, str(ROOT / "scripts" / "distill.py"), *map(str, arguments)]


def _run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=_environment(), capture_output=True, text=True, timeout=300)


def _largest_difference(one: Path, other: Path) -> float:
    first, second = load_file(one / "student" / "model.safetensors"), load_file(other / "student" / "model.safetensors")
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def _same() -> tuple[str, ...]:
    return (*SAME, f"teacher.model={finished_run() / 'teacher' / 'model'}", "augment.masked_lm=tiny-random")


@functools.cache
def _alone() -> Path:
    """The run of `_same` on one process."""
    folder = finished_run().with_name("alone")
    succeed(TINY, *_same(), "--output", folder)
    return folder


@pytest.mark.parametrize(
    ("launch", "says"),
    [
        pytest.param(TWO, "2 process(es) on cpu, precision", id="arguments"),
        pytest.param(
            ("--config_file", str(ROOT / "configs/accelerate/cpu_two_processes.yaml")),
            "2 process(es) on cpu, precision",
            id="file",
        ),
        pytest.param(SHARDS, "2 process(es) on cpu, in shards (FSDP), precision", id="shards"),
        pytest.param(
            (*SHARDS[:2], *TWO),
            "2 process(es) on cpu, in shards (FSDP), precision",
            id="shards-cpu",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_processes_give_the_student_of_one(launch: tuple[str, ...], says: str, tmp_path: Path) -> None:
    one, two = _alone(), tmp_path / "two"
    together = _run(_script(TINY, *_same(), "--output", two, launch=launch), tmp_path)
    assert together.returncode == 0, together.stderr[-3000:]
    assert says in together.stdout
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


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "accelerate").iterdir()), ids=lambda file: file.stem)
def test_a_launch_file_is_one_that_accelerate_reads(file: Path) -> None:
    config = load_config_from_file(str(file))
    assert config.num_processes % config.num_machines == 0
    assert config.distributed_type.value in ("MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED")
    if config.distributed_type is DistributedType.FSDP:
        assert config.fsdp_config["fsdp_version"] == 2
    if config.distributed_type is DistributedType.DEEPSPEED:
        assert config.deepspeed_config["zero_stage"] in (1, 2)
        assert "refuse" in file.read_text(encoding="utf-8").splitlines()[0]


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM"])
def test_what_fit_cannot_shard_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")  # as accelerate's launcher tells its scripts
    outcome = run_cli(TINY, *FEW_STEPS, "--output", tmp_path / "run")
    assert outcome.status == 2
    assert f"error: accelerate launch: {kind} cuts the student" in outcome.err
    assert "FSDP" in outcome.err
    assert not (tmp_path / "run").exists()


def test_one_process_has_nothing_to_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    outcome = succeed(TINY, *FEW_STEPS, "--dry-run", "--output", tmp_path / "run")
    assert "1 process(es) on cpu, precision" in outcome.out
    assert "ACCELERATE_USE_FSDP" not in os.environ  # transformers reads it too


def test_how_long_processes_wait_is_nothing_that_a_finished_stage_depends_on(tmp_path: Path) -> None:
    folder = shutil.copytree(finished_run(), tmp_path / "run")
    again = succeed(folder / "config.yaml", "tracking=[]", "runtime.process_timeout_seconds=77", "--output", folder)
    assert again.out.count("done before, skipped") == 6


# ---- faults of one among several


def _launched_two(
    *arguments: str | Path, cwd: Path, launch: tuple[str, ...] = TWO
) -> tuple[subprocess.Popen[str], Callable[[], list[psutil.Process]]]:
    """A run of two processes; the processes, when they are there."""
    launched = subprocess.Popen(
        _script(TINY, *arguments, launch=launch),
        cwd=cwd,
        env=_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )

    def ranks() -> list[psutil.Process]:
        # What a rank has started itself (a tracker of semaphores) inherits its environment.
        below = psutil.Process(launched.pid).children(recursive=True)
        started = {child.pid for child in below if "RANK" in child.environ()}
        return [child for child in below if child.pid in started and child.ppid() not in started]

    return launched, ranks


def _long() -> tuple[str, ...]:
    """A run that lasts long enough for something to happen to it."""
    return (*_same(), "task.logits.max_steps=60", "task.logits.save_every_steps=5")


@functools.cache
def _undisturbed() -> Path:
    """The run of `_long` on one process."""
    folder = finished_run().with_name("undisturbed")
    succeed(TINY, *_long(), "--output", folder)
    return folder


def _wait_for(folder: Path, pattern: str, pause: float = 0.01) -> None:
    deadline = time.monotonic() + 240
    while not list(folder.glob(pattern)):
        assert time.monotonic() < deadline, f"{pattern} never came"
        time.sleep(pause)


@pytest.mark.faults
def test_a_killed_process_ends_the_others_and_the_run_goes_on_with_another_number_of_them(tmp_path: Path) -> None:
    two, same = tmp_path / "two", _long()
    launched, ranks = _launched_two(*same, "--output", two, cwd=tmp_path)
    _wait_for(two / "task" / "logits" / "checkpoints", "checkpoint-*")
    both = ranks()
    next(rank for rank in both if rank.environ().get("RANK") == "1").kill()
    _, errors = launched.communicate(timeout=120)
    assert launched.returncode == 1, errors[-3000:]
    assert not any(rank.is_running() for rank in both)

    resumed = succeed(TINY, *same, "--output", two)
    assert "1 process(es)" in resumed.out
    assert "general: done before, skipped" in resumed.out
    assert _largest_difference(_undisturbed(), two) < 2e-5


@functools.cache
def _undisturbed_shards() -> Path:
    """The run of `_long` on two processes in shards."""
    folder = finished_run().with_name("undisturbed_shards")
    done = _run(_script(TINY, *_long(), "--output", folder, launch=SHARDS), ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.faults
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_in_shards_that_was_stopped_goes_on_in_shards_to_the_bit_and_on_one_process(
    signum: signal.Signals, tmp_path: Path
) -> None:
    two, alone, same = tmp_path / "two", tmp_path / "alone", _long()
    launched, ranks = _launched_two(*same, "--output", two, cwd=tmp_path, launch=SHARDS)
    _wait_for(two / "task" / "logits" / "checkpoints", "checkpoint-*")
    next(rank for rank in ranks() if rank.environ().get("RANK") == "1").send_signal(signum)
    _, errors = launched.communicate(timeout=120)
    assert launched.returncode == 1, errors[-3000:]  # accelerate's launcher turns every failure into 1
    assert ("SIGTERM: the run stopped after saving" in errors) == (signum == signal.SIGTERM)
    shutil.copytree(two, alone)

    resumed = _run(_script(TINY, *same, "--output", two, launch=SHARDS), tmp_path)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "general: done before, skipped" in resumed.stdout
    assert _largest_difference(_undisturbed_shards(), two) == 0
    assert "general: done before, skipped" in succeed(TINY, *same, "--output", alone).out
    assert _largest_difference(_undisturbed(), alone) < 2e-5


@pytest.fixture
def two_machines() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them, 10.77.0.1 and 10.77.0.2; the names of the namespaces."""
    if shutil.which("ip") is None:
        pytest.skip("the command ip is not there")
    names = tuple(f"tinybert{os.getpid()}{side}" for side in "ab")
    cable = [f"tb{os.getpid() % 100000}{side}" for side in "ab"]
    steps = [["ip", "netns", "add", name] for name in names]
    steps.append(["ip", "link", "add", cable[0], "type", "veth", "peer", "name", cable[1]])
    for number, (name, end) in enumerate(zip(names, cable, strict=True), start=1):
        inside = ["ip", "-n", name]
        steps += [
            ["ip", "link", "set", end, "netns", name],
            [*inside, "link", "set", end, "name", "cable"],
            [*inside, "addr", "add", f"10.77.0.{number}/24", "dev", "cable"],
            [*inside, "link", "set", "cable", "up"],
            [*inside, "link", "set", "lo", "up"],
        ]
    try:
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"this machine allows no network namespaces: {' '.join(step)}: {done.stderr.strip()}")
        yield names  # type: ignore[misc]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@pytest.mark.faults
def test_two_machines_give_the_student_of_one(two_machines: tuple[str, str], tmp_path: Path) -> None:
    one, two = _alone(), tmp_path / "two"
    launch = (*TWO, "--num_machines", "2", "--main_process_ip", "10.77.0.1")
    # The host's name is that of the loopback here.
    environment = _environment() | {"GLOO_SOCKET_IFNAME": "cable"}
    launched = []
    for rank, name in enumerate(two_machines):
        own = (*launch, "--main_process_port", "29555", "--machine_rank", str(rank))
        command = ["ip", "netns", "exec", name, *_script(TINY, *_same(), "--output", two, launch=own)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        launched.append(subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes))
    told = [process.communicate(timeout=300) for process in launched]
    assert [process.returncode for process in launched] == [0, 0], [errors[-3000:] for _, errors in told]
    assert "2 process(es)" in told[0][0]
    assert _largest_difference(one, two) < 2e-5


@pytest.mark.faults
def test_processes_killed_in_the_midst_of_saving_go_on_from_what_was_saved(tmp_path: Path) -> None:
    """One of two, again and again, at a random moment while the folder of a checkpoint is being filled."""
    two, same = tmp_path / "two", (*_long(), "task.logits.save_every_steps=1")
    checkpoints, moments = two / "task" / "logits" / "checkpoints", random.Random(20260101)
    for number in range(3):
        before = newest_whole(checkpoints)
        launched, ranks = _launched_two(*same, "--output", two, cwd=tmp_path)
        _wait_for(checkpoints, "checkpoint-*" if before is None else f"checkpoint-{int(before.name[-8:]) + 1:08d}")
        victim = next(rank for rank in ranks() if rank.environ().get("RANK") == str(number % 2))
        moment = moments.uniform(0, 0.02)
        _wait_for(checkpoints, ".checkpoint-*.part", pause=0)
        time.sleep(moment)
        saved = newest_whole(checkpoints)
        victim.kill()
        counted["kills"] += 1
        _, errors = launched.communicate(timeout=200)
        assert launched.returncode == 1, errors[-3000:]
        after = newest_whole(checkpoints)
        assert saved is not None
        assert after is not None
        lost = after.name < saved.name
        counted["lost_bytes"] += lost * sum(file.stat().st_size for file in saved.rglob("*"))
        assert not lost
    resumed = _run(_script(TINY, *same, "--output", two, launch=TWO), tmp_path)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "general: done before, skipped" in resumed.stdout
    same_weights = _largest_difference(_undisturbed(), two) < 2e-5
    counted["resumed"] += 3
    counted["different_weights"] += not same_weights
    assert same_weights


@pytest.mark.faults
@pytest.mark.parametrize("hung", [0, 1])
def test_a_process_that_hangs_ends_the_run_with_its_name_and_the_run_goes_on(hung: int, tmp_path: Path) -> None:
    two, same = tmp_path / "two", _long()
    launched, ranks = _launched_two(*same, "runtime.process_timeout_seconds=12", "--output", two, cwd=tmp_path)
    _wait_for(two / "task" / "logits" / "checkpoints", "checkpoint-*")
    stopped = next(rank for rank in ranks() if rank.environ().get("RANK") == str(hung))
    # The launcher gives a process that is stopped 30 s to end by itself. Whoever else stops and continues processes on
    # this machine must not wake it.
    deadline, errors = time.monotonic() + 400, None
    while errors is None and time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            stopped.suspend()
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, errors = launched.communicate(timeout=0.2)
    assert errors is not None, "it still waits"
    assert launched.returncode == 1, errors[-3000:]
    assert not stopped.is_running()
    told = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(told) == 1, errors[-3000:]
    assert told[0].startswith(
        f"error: task: process {hung} on {socket.gethostname()} did not answer for 12 s (runtime."
    )
    assert "start the same command again" in told[0]

    resumed = succeed(TINY, *same, "--output", two)
    assert "general: done before, skipped" in resumed.out
    assert _largest_difference(_undisturbed(), two) < 2e-5
