"""Claims about distill/checkpoint.py: files are whole or not there, the newest undamaged checkpoint is the one used.
That a training goes on from one to the same bit is test_training.py's, whole runs test_faults.py's."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from distill.checkpoint import MANIFEST, STATE, Checkpoints, damage_of, write_folder, write_json
from distill.settings import RunError


class Training:
    """A linear layer under AdamW; after N steps its first weight is `weights[N]`."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        accelerator = Accelerator()
        torch.manual_seed(0)
        model = nn.Linear(3, 3)
        self.model, self.optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
        self.checkpoints = Checkpoints(folder / "checkpoints", accelerator, keep)
        self.weights: dict[int, float] = {}

    def run(self, *save_after: int, best_step: int | None = None) -> None:
        for step in range(1, max(save_after) + 1):
            self.model(torch.ones(1, 3)).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.weights[step] = float(self.model.weight[0, 0].detach())
            if step == best_step:
                self.checkpoints.save_best(step, {"weight": self.model.weight})
            if step in save_after:
                known = best_step if best_step is not None and best_step <= step else None
                self.checkpoints.save(step, {"tokens": 7 * step, "best_step": known})

    def names(self) -> list[str]:
        return sorted(path.name for path in self.checkpoints.folder.iterdir())


@pytest.fixture
def training(tmp_path: Path) -> Training:
    return Training(tmp_path)


def resumed(folder: Path) -> tuple[dict[str, Any] | None, float]:
    """What a new process finds: the state, and the first weight."""
    other = Training(folder)
    state = other.checkpoints.load()
    return state, float(other.model.weight[0, 0].detach())


def test_the_manifest_has_size_and_sha256_of_every_file(training: Training) -> None:
    training.run(2, best_step=1)
    folder = training.checkpoints.folder / "checkpoint-00000002"
    manifest = json.loads((folder / MANIFEST).read_text())
    expected = {
        path.name: {"bytes": len(path.read_bytes()), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
        if path.name != MANIFEST
    }
    assert manifest["files"] == expected
    assert {"model.safetensors", "optimizer.bin", "random_states_0.pkl", STATE} <= expected.keys()
    best = training.checkpoints.folder / "best-00000001.safetensors"
    assert manifest["best"]["file"] == best.name
    assert manifest["best"]["sha256"] == hashlib.sha256(best.read_bytes()).hexdigest()


def test_the_newest_is_used(training: Training, tmp_path: Path) -> None:
    training.run(2, 4)
    assert resumed(tmp_path) == ({"step": 4, "tokens": 28, "best_step": None}, training.weights[4])


def test_nothing_is_found_where_nothing_was_saved(tmp_path: Path) -> None:
    assert resumed(tmp_path)[0] is None


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "model with a flipped bit": (lambda at: _flip(at / "model.safetensors"), "model.safetensors has other content"),
    "model cut off": (lambda at: _truncate(at / "model.safetensors"), "model.safetensors has .* bytes instead of"),
    "optimizer with a flipped bit": (lambda at: _flip(at / "optimizer.bin"), "optimizer.bin has other content"),
    "optimizer empty": (lambda at: (at / "optimizer.bin").write_bytes(b""), "optimizer.bin has 0 bytes"),
    "random state gone": (lambda at: (at / "random_states_0.pkl").unlink(), "random_states_0.pkl is missing"),
    "state empty": (lambda at: (at / STATE).write_bytes(b""), "state.json has 0 bytes"),
    "state of other figures": (
        lambda at: (at / STATE).write_text((at / STATE).read_text().replace("28", "29")),
        "state.json has other content",
    ),
    "state gone": (lambda at: (at / STATE).unlink(), "state.json is missing"),
    "manifest gone": (lambda at: (at / MANIFEST).unlink(), "manifest.json is missing"),
    "manifest empty": (lambda at: (at / MANIFEST).write_text(""), "manifest.json cannot be read"),
    "manifest of garbage": (lambda at: (at / MANIFEST).write_bytes(b"\xff\x00\xfe"), "manifest.json cannot be read"),
    "manifest a list": (lambda at: (at / MANIFEST).write_text("[]"), "manifest.json cannot be read"),
    "manifest of nothing": (
        lambda at: (at / MANIFEST).write_text('{"files": {}, "best": null}'),
        "manifest.json names no state.json",
    ),
    "everything gone": (lambda at: [file.unlink() for file in at.iterdir()], "manifest.json is missing"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_one_is_named_and_the_one_before_it_taken(
    case: str, training: Training, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training.run(2, 4)
    damage, message = DAMAGE[case]
    damage(training.checkpoints.folder / "checkpoint-00000004")
    with caplog.at_level(logging.WARNING):
        state, weight = resumed(tmp_path)
    assert state == {"step": 2, "tokens": 14, "best_step": None}
    assert weight == training.weights[2]
    [record] = caplog.records
    assert "checkpoint-00000004 is damaged" in record.getMessage()
    assert record.getMessage().endswith("Going on from checkpoint-00000002.")
    assert re.search(message, record.getMessage())


def test_best_weights_that_are_damaged_damage_the_checkpoints_that_need_them(
    training: Training, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training.run(2, 4, best_step=3)
    _flip(training.checkpoints.folder / "best-00000003.safetensors")
    state, weight = resumed(tmp_path)
    assert state is not None
    assert (state["step"], weight) == (2, training.weights[2])
    assert "best-00000003.safetensors has other content" in caplog.text


def test_where_all_are_damaged_the_training_begins_anew(
    training: Training, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training.run(2, 4)
    for name in training.names():
        _truncate(training.checkpoints.folder / name / "model.safetensors")
    assert resumed(tmp_path)[0] is None
    assert len(caplog.records) == 2
    assert "this training begins anew" in caplog.text


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_keep_bounds_what_stays(keep: int, tmp_path: Path) -> None:
    training = Training(tmp_path, keep)
    training.run(*range(1, 7), best_step=2)
    expected = [f"checkpoint-{step:08d}" for step in range(1, 7)][-keep:]
    assert training.names() == ["best-00000002.safetensors", *expected]


def test_best_weights_stay_as_long_as_a_kept_checkpoint_needs_them(training: Training) -> None:
    training.run(2, 4, best_step=1)
    training.checkpoints.save_best(5, {"weight": training.model.weight})
    training.checkpoints.save(6, {"best_step": 5})
    assert [name for name in training.names() if name.startswith("best")] == [
        "best-00000001.safetensors",  # of checkpoint 4
        "best-00000005.safetensors",
    ]
    training.checkpoints.save(8, {"best_step": 5})
    assert [name for name in training.names() if name.startswith("best")] == ["best-00000005.safetensors"]


def test_what_a_kill_left_and_what_is_damaged_is_cleared_by_the_next_save(training: Training, tmp_path: Path) -> None:
    training.run(2, 4)
    _truncate(training.checkpoints.folder / "checkpoint-00000004" / STATE)
    (training.checkpoints.folder / ".checkpoint-00000003.part").mkdir()
    other = Training(tmp_path)
    assert other.checkpoints.load() == {"step": 2, "tokens": 14, "best_step": None}
    other.checkpoints.save(3, {"best_step": None})
    assert other.names() == ["checkpoint-00000002", "checkpoint-00000003"]


def test_a_checkpoint_that_the_disk_does_not_take_leaves_the_ones_before(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.run(2, 4)

    def full(folder: str) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training.checkpoints.accelerator, "save_state", full)
    with pytest.raises(RunError, match=r"checkpoint-00000006 could not be written: No space left .* Free some space"):
        training.checkpoints.save(6, {"best_step": None})
    assert training.names() == ["checkpoint-00000002", "checkpoint-00000004"]
    for name in training.names():
        assert damage_of(training.checkpoints.folder / name) is None


# ---- atomic files


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    def fill(text: str) -> Callable[[Path], None]:
        return lambda folder: (folder / "file").write_text(text, encoding="utf-8") and None

    def fail(folder: Path) -> None:
        (folder / "file").write_text("half", encoding="utf-8")
        raise OSError("disk full")

    target = tmp_path / "student"
    write_folder(target, fill("old"))
    with pytest.raises(OSError, match="disk full"):
        write_folder(target, fail)
    assert (target / "file").read_text(encoding="utf-8") == "old"
    write_folder(target, fill("new"))
    assert (target / "file").read_text(encoding="utf-8") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    def values() -> Iterator[Any]:
        yield {"whole": True}
        yield {"broken": object()}

    path = tmp_path / "result.json"
    for value in values():
        try:
            write_json(path, value)
        except TypeError:
            continue
    assert path.read_text(encoding="utf-8") == '{\n  "whole": true\n}\n'
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]
