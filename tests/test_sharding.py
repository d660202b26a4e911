"""Claims about trainings in shards (FSDP): the student is that of one process, and stopping costs nothing.
The processes are started once and do what sharded_training.py says; test_distributed.py launches whole runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distill.checkpoint import cpu_state
from tests.builders import ROOT
from tests.sharded_training import OPTIONS, STOP, TRAININGS, norms, plain
from tests.toy_training import Setting, require_equal


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left."""
    folder = tmp_path_factory.mktemp("shards")
    plain(Setting(folder / "one"), "stopped", stop_after=STOP)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "sharded_training.py"), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "view tensor" not in done.stderr
    return folder


def left(folder: Path, name: str) -> dict[str, Tensor]:
    """The student that both processes hold."""
    first, second = (load_file(folder / f"{name}-{rank}.safetensors") for rank in (0, 1))
    require_equal(first, second)
    return first


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_in_shards_give_the_student_of_one(name: str, folder: Path, tmp_path: Path) -> None:
    student = TRAININGS[name](Setting(tmp_path))
    assert largest_difference(left(folder, name), cpu_state(student)) < 2e-5
    first = Setting(tmp_path).student(dropout=0)
    assert largest_difference(cpu_state(first), cpu_state(student)) > 1e-3  # they trained


def test_gradients_are_averaged_and_their_norm_is_over_all_shards(folder: Path, tmp_path: Path) -> None:
    # AdamW would hide a factor.
    alone = norms(Setting(tmp_path))
    assert min(alone) > OPTIONS.max_gradient_norm
    for rank in (0, 1):
        assert json.loads((folder / f"norms-{rank}.json").read_text()) == pytest.approx(alone, rel=1e-4)


def test_shares_of_the_gradient_are_measured_on_the_trained_weights(folder: Path) -> None:
    assert largest_difference(left(folder, "balanced"), left(folder, "balanced_whole")) < 2e-5


def test_a_stopped_training_in_shards_goes_on_to_the_bit(folder: Path) -> None:
    # With dropout, and weights chosen by validation.
    require_equal(left(folder, "dropout_resumed"), left(folder, "dropout"))


def test_one_process_goes_on_from_shards_and_shards_from_one_process(folder: Path, tmp_path: Path) -> None:
    unbroken = cpu_state(plain(Setting(tmp_path)))
    assert (folder / "two" / "stopped" / f"checkpoint-{STOP:08d}").is_dir()
    resumed = plain(Setting(folder / "two"), "stopped")
    assert largest_difference(cpu_state(resumed), unbroken) < 2e-5
    assert largest_difference(left(folder, "resumed_by_two"), unbroken) < 2e-5


def test_a_checkpoint_of_shards_is_that_of_a_training_without(folder: Path) -> None:
    names, states = [], []
    for which in ("one", "two"):
        checkpoint = folder / which / "stopped" / f"checkpoint-{STOP:08d}"
        if which == "one":  # the two went on from it to the end
            checkpoint = max((folder / which / "stopped").glob("checkpoint-*"))
        names.append({file.name for file in checkpoint.iterdir()} - {"random_states_1.pkl"})
        states.append(torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"])
    assert names[0] == names[1]
    assert states[0].keys() == states[1].keys()
    shapes = [{index: {n: t.shape for n, t in own.items()} for index, own in state.items()} for state in states]
    assert shapes[0] == shapes[1]
    assert all(type(tensor) is Tensor for own in states[1].values() for tensor in own.values())


def test_weights_gradients_and_moments_are_held_once_over_all_processes(folder: Path) -> None:
    held = [json.loads((folder / f"held-{rank}.json").read_text()) for rank in (0, 1)]
    whole = held[0]["whole"]
    for what, times in (("weights", 1), ("gradients", 1), ("moments", 2)):
        assert sum(own["elements"][what] for own in held) == times * whole
        assert max(own["bytes"][what] for own in held) < 0.52 * 4 * times * whole


def test_a_refused_step_changes_no_shard(folder: Path) -> None:
    assert all(json.loads((folder / f"held-{rank}.json").read_text())["kept"] for rank in (0, 1))


def test_every_training_of_a_student_is_in_the_precision_of_the_run(folder: Path) -> None:
    for rank in (0, 1):
        dtypes = json.loads((folder / f"dtypes-{rank}.json").read_text())
        assert dtypes == ["torch.float32"] + ["torch.bfloat16"] * 6
