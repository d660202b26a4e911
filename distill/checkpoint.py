"""Files that are whole or not there: atomic writes, and the training checkpoints that `fit` resumes from.
What is in a model, an optimizer or a random state is left to Accelerate's save_state."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

STATE = "state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, flush to the disk, rename."""
    _atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _atomically(path, lambda temporary: save_file(contiguous, temporary, metadata={"format": "pt"}))


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder under a temporary name, flush its files, then put it in the place of `path`."""
    temporary = path.with_name(f".{path.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for file in temporary.rglob("*"):
        if file.is_file():
            _flush(file)
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    _flush(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _atomically(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f".{path.name}.part")
    try:
        write(temporary)
        _flush(temporary)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Checkpoints:
    """The checkpoints of one call of `fit`, in a folder of its own.

    checkpoint-N/ holds what Accelerate saves after N steps, and state.json, which is written last in a folder that
    is renamed when complete. best-N.safetensors holds the weights that did best on validation; the state that names
    one keeps it.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, keep: int = 1) -> None:
        self.folder, self.accelerator, self.keep = folder, accelerator, keep

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Save after `step` steps; all processes must call it together."""
        final = self.folder / f"checkpoint-{step:08d}"
        temporary = self.folder / f".{final.name}.part"
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_json(temporary / STATE, {"step": step, **state})
            for file in temporary.iterdir():
                _flush(file)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            _flush(self.folder)
            self._forget(state.get("best_step"))
        self.accelerator.wait_for_everyone()

    def load(self) -> dict[str, Any] | None:
        """Put the newest checkpoint's content into what was prepared; its state, or None where there is none."""
        found = self._complete()
        if not found:
            return None
        self.accelerator.load_state(str(found[-1]))
        state: dict[str, Any] = json.loads((found[-1] / STATE).read_text(encoding="utf-8"))
        return state

    def save_best(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_tensors(self._best(step), tensors)
        self.accelerator.wait_for_everyone()

    def load_best(self, step: int) -> dict[str, Tensor]:
        return load_file(self._best(step))

    def clear(self) -> None:
        """Remove everything; the work that the checkpoints protected is done."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _best(self, step: int) -> Path:
        return self.folder / f"best-{step:08d}.safetensors"

    def _complete(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if _NAME.fullmatch(p.name) and (p / STATE).is_file())

    def _forget(self, best_step: int | None) -> None:
        for old in self._complete()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        kept = {self._best(best_step)} if best_step is not None else set()
        for state in self._complete():
            step = json.loads((state / STATE).read_text(encoding="utf-8")).get("best_step")
            if step is not None:
                kept.add(self._best(step))
        for file in self.folder.glob("best-*.safetensors"):
            if file not in kept:
                file.unlink()


def cpu_state(module: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
