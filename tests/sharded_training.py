"""What processes do together for test_sharding.py: each training in shards, its student left in the folder.
Started by torch's launcher with that folder as argument; what is claimed of the students is the tests'."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from distill.activations import Needs
from distill.checkpoint import cpu_state, write_json, write_tensors
from distill.data import Placement
from distill.interruption import Interrupted
from distill.losses import AttentionLoss
from distill.sharding import Shards
from distill.students import Student, StudentOptions, build_student, student_config
from tests.builders import ListTracker
from tests.toy_training import LAYERS, TASK, Setting, dtypes_of_a_second_training
from tests.toy_training import OPTIONS as MORE

OPTIONS = replace(MORE, max_steps=6, evaluate_every_steps=2)
STOP = 4


def plain(
    setting: Setting, folder: str = "plain", stop_after: int | None = None, tracker: ListTracker | None = None
) -> Student:
    student = setting.student(dropout=0)
    if setting.placement.rank:
        torch.nn.init.zeros_(next(student.parameters()))  # the first process's weights are everyone's
    with contextlib.suppress(Interrupted):
        setting.fit(student, OPTIONS, folder=folder, stop_after=stop_after, tracker=tracker)
    return student


def norms(setting: Setting) -> list[float]:
    """Of the gradients of each step, before they were clipped."""
    tracker = ListTracker()
    plain(setting, "norms", tracker=tracker)
    return tracker.curve("train/gradient_norm")


def _accumulating(setting: Setting) -> Student:
    student = setting.student(dropout=0)
    setting.fit(student, replace(OPTIONS, gradient_accumulation_steps=2), folder="accumulating")
    return student


def _measured_and_chosen(setting: Setting) -> Student:
    student = setting.student(dropout=0)
    options = replace(OPTIONS, measure_gradients_every_steps=2)
    setting.fit(student, options, folder="measured", validation=setting.held_out(student))
    return student


def _attention_alone(setting: Setting) -> Student:
    """The output of the last layer is in no loss, what is inside it is."""
    student = setting.student(dropout=0)
    setting.fit(student, OPTIONS, terms={"attention": AttentionLoss()}, folder="attention")
    return student


def _two_trainings(setting: Setting) -> Student:
    """One after the other, as in the stage task; the first leaves the head alone."""
    student = setting.student(dropout=0)
    setting.fit(student, OPTIONS, terms=LAYERS, folder="first")
    setting.fit(student, OPTIONS, folder="second")
    return student


TRAININGS: dict[str, Callable[[Setting], Student]] = {
    "plain": plain,
    "accumulating": _accumulating,
    "measured_and_chosen": _measured_and_chosen,
    "attention_alone": _attention_alone,
    "two_trainings": _two_trainings,
}
"""Trainings without dropout: any number of processes gives the same student."""


def _balanced(setting: Setting) -> Student:
    """Each process measures its own share of a batch: to be compared with as many processes alone."""
    student = setting.student(dropout=0)
    options = replace(OPTIONS, balance="gradient", measure_gradients_every_steps=2)
    setting.fit(student, options, folder=f"balanced-{setting.sharded}")
    return student


def _with_dropout(setting: Setting, folder: str, stop_after: int | None = None) -> Student:
    torch.manual_seed(42)
    student = setting.student()
    with contextlib.suppress(Interrupted):
        setting.fit(student, OPTIONS, folder=folder, stop_after=stop_after, validation=setting.held_out(student))
    return student


def _held(setting: Setting) -> dict[str, object]:
    """Elements that this process holds after a step, and whether a refused step changes anything."""
    shape = StudentOptions(layers=2, width=24, heads=4, intermediate_size=48, dropout=0)
    config = student_config(setting.teacher.config, shape)
    config.num_labels = 1  # one process has nothing of the head's bias
    student = build_student(config, TASK, shape, 32, seed=3)
    accelerator = Accelerator()
    shards = Shards(student, accelerator)
    optimizer = accelerator.prepare(shards.optimizer(1e-3, 0.01))
    batch = next(setting.batches(OPTIONS).steps(0, 1))[0]

    def step(refused: float) -> None:
        shown = shards(batch, Needs(hidden=frozenset({0, 1, 2}), logits=True))
        (sum(hidden.square().mean() for hidden in shown.hidden.values()) + shown.logits.square().mean()).backward()
        optimizer.optimizer.found_inf = torch.tensor(refused)
        optimizer.step()

    def local(tensors: Iterable[Any]) -> list[Tensor]:
        return [tensor.to_local() for tensor in tensors]

    def moments() -> list[Any]:
        return [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]

    step(0.0)
    gradients = local(shard.grad for shard in shards.parameters())
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())  # as a training that goes on
    before = [tensor.clone() for tensor in local((*shards.parameters(), *moments()))]
    step(1.0)
    after = local((*shards.parameters(), *moments()))
    held = {"weights": local(shards.parameters()), "gradients": gradients, "moments": local(moments())}
    return {
        "whole": sum(parameter.numel() for parameter in student.parameters()),
        "elements": {name: sum(tensor.numel() for tensor in tensors) for name, tensors in held.items()},
        "bytes": {name: _bytes(tensors) for name, tensors in held.items()},
        "kept": all(torch.equal(one, other) for one, other in zip(before, after, strict=True)),
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of what they are views of, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def main(folder: Path) -> None:
    Accelerator(cpu=True)
    rank = int(os.environ["RANK"])
    placement = Placement(int(os.environ["WORLD_SIZE"]), rank)
    setting = Setting(folder / "two", placement, sharded=True)
    students = {name: train(setting) for name, train in TRAININGS.items()}
    students["resumed_by_two"] = plain(Setting(folder / "one", placement, sharded=True), "stopped")
    students["balanced"] = _balanced(setting)
    students["balanced_whole"] = _balanced(Setting(folder / "two", placement))
    plain(setting, "stopped", stop_after=STOP)
    students["dropout"] = _with_dropout(setting, "dropout")
    _with_dropout(setting, "dropout_stopped", stop_after=STOP)
    students["dropout_resumed"] = _with_dropout(setting, "dropout_stopped")
    for name, student in students.items():
        write_tensors(folder / f"{name}-{rank}.safetensors", cpu_state(student))
    write_json(folder / f"norms-{rank}.json", norms(setting))
    write_json(folder / f"held-{rank}.json", _held(setting))
    write_json(folder / f"dtypes-{rank}.json", dtypes_of_a_second_training(setting))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
