"""Files that are whole or not there: atomic writes, and the training checkpoints that `fit` resumes from.
What is in a model, an optimizer or a random state is left to Accelerate's save_state."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.settings import RunError

STATE, MANIFEST = "state.json", "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_log = logging.getLogger(__name__)


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
    with _replacing(path) as temporary:
        fill(temporary)
        _flush_all(temporary)
        aside = _put_aside(path)
        temporary.rename(path)
        _flush(path.parent)
        shutil.rmtree(aside, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Take a folder away whole: killed in the midst, nothing of it stands under its name."""
    aside = _put_aside(path)
    if aside.exists():
        _flush(path.parent)
        shutil.rmtree(aside, ignore_errors=True)


def _put_aside(path: Path) -> Path:
    """Rename a folder, where it is there, to a hidden name, under which an earlier one is removed."""
    aside = path.with_name(f".{path.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if path.exists():
        path.rename(aside)
    return aside


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """An empty folder to fill and rename to `path`; removed where that fails, so that it holds no disk.

    Raises:
        RunError: it could not be written.
    """
    temporary = _part(path)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if _is_of_the_disk(error):
            raise storage_error(path, error) from error
        raise


def _atomically(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = _part(path)
    try:
        write(temporary)
        _flush(temporary)
        temporary.rename(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if _is_of_the_disk(error):
            raise storage_error(path, error) from error
        raise
    _flush(path.parent)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _is_of_the_disk(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno is not None  # those that libraries raise for reasons of their own have none
    # What safetensors and torch's archive writer (inline_container.cc) raise for a write that failed.
    return isinstance(error, SafetensorError) or (isinstance(error, RuntimeError) and "inline_container" in str(error))


def storage_error(path: Path | str, error: BaseException) -> RunError:
    """The error for a file that could not be written."""
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error).splitlines()[0]
    full = not isinstance(error, OSError) or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    free = "Free some space there" if full else "See to the disk and its permissions"
    return RunError(
        f"{path} could not be written: {reason}. {free} and start the same command again: it goes on from the last "
        "checkpoint, and what was saved before is kept."
    )


def _flush_all(folder: Path) -> None:
    """The files of a folder, and the folders that name them."""
    for path in folder.rglob("*"):
        _flush(path)
    _flush(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Checkpoints:
    """The checkpoints of one call of `fit`, in a folder of its own.

    checkpoint-N/ holds what Accelerate saves after N steps, state.json, and manifest.json, which is written last in a
    folder that is renamed when complete: the size and sha256 of every file. best-N.safetensors holds the weights that
    did best on validation; manifests of the checkpoints that need it name it.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, keep: int = 2) -> None:
        self.folder, self.accelerator, self.keep = folder, accelerator, keep
        self._damaged: set[Path] = set()

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Save after `step` steps; all processes must call it together.

        Raises:
            RunError: the disk does not take it.
        """
        final = self.folder / f"checkpoint-{step:08d}"
        best_step = state.get("best_step")
        if self.accelerator.is_main_process:
            with _replacing(final) as temporary:
                self._fill(temporary)
                write_json(temporary / STATE, {"step": step, **state})
                best = None if best_step is None else self._best(best_step)
                _flush_all(temporary)
                write_json(
                    temporary / MANIFEST,
                    {
                        "files": {str(file.relative_to(temporary)): _seal(file) for file in _files(temporary)},
                        "best": None if best is None else {"file": best.name, **_seal(best)},
                    },
                )
                shutil.rmtree(final, ignore_errors=True)
                temporary.rename(final)
                _flush(self.folder)
            self._damaged.discard(final)
            self._forget()
        else:
            self._fill(_part(final))
        self.accelerator.wait_for_everyone()

    def _fill(self, folder: Path) -> None:
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(folder))
        self.accelerator.wait_for_everyone()

    def load(self) -> dict[str, Any] | None:
        """Put the newest undamaged checkpoint's content into what was prepared; its state, or None where there is none.

        A damaged one is named in the log and passed over.
        """
        choice = [self._newest_whole() if self.accelerator.is_main_process else None]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(choice)
        if choice[0] is None:
            return None
        found = self.folder / choice[0]
        self.accelerator.load_state(str(found))
        state: dict[str, Any] = json.loads((found / STATE).read_text(encoding="utf-8"))
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

    def _found(self) -> list[Path]:
        """By step, the newest last."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))

    def _newest_whole(self) -> str | None:
        found = self._found()
        for index, path in reversed(list(enumerate(found))):
            damage = damage_of(path)
            if damage is None:
                return path.name
            self._damaged.add(path)
            instead = found[index - 1].name if index else "nothing: this training begins anew"
            _log.warning("%s is damaged: %s. Going on from %s.", path, damage, instead)
        return None

    def _forget(self) -> None:
        """Remove what `keep` does not keep: older checkpoints, damaged ones, weights that none of those kept names."""
        whole = [path for path in self._found() if path not in self._damaged]
        kept = whole[-self.keep :]
        best = set()
        for path in kept:
            try:
                named = json.loads((path / MANIFEST).read_bytes())["best"]
                best.add(named["file"] if named is not None else None)
            except (OSError, ValueError, KeyError, TypeError):
                self._damaged.add(path)
        for path in self.folder.iterdir():
            if path.is_dir() and (path not in kept or path in self._damaged):
                shutil.rmtree(path, ignore_errors=True)
            elif path.is_file() and path.name not in best:
                path.unlink()


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint: a file that is missing, of another size or content; None for nothing."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        files, best = dict(manifest["files"]), manifest["best"]
        if STATE not in files:
            return f"{MANIFEST} names no {STATE}"
        names = [*files, *([best["file"]] if best is not None else [])]
        if strange := [name for name in names if not name.isprintable()]:
            return f"{MANIFEST} names {strange[0]!a}, which is no file of a checkpoint"
        elsewhere = [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts]
        elsewhere += [best["file"]] if best is not None and Path(best["file"]).name != best["file"] else []
        if elsewhere:
            return f"{MANIFEST} names {elsewhere[0]}, which lies elsewhere"
        sealed = [(checkpoint / name, seal) for name, seal in files.items()]
        if best is not None:
            sealed.append((checkpoint.parent / best["file"], {name: best[name] for name in ("bytes", "sha256")}))
        for path, seal in sealed:
            if not path.is_file():
                return f"{path.name} is missing"
            if path.stat().st_size != seal["bytes"]:
                return f"{path.name} has {path.stat().st_size:,} bytes instead of {seal['bytes']:,}"
            if _seal(path) != seal:
                return f"{path.name} has other content than was written"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        return f"{MANIFEST} cannot be read"
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _seal(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cpu_state(module: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
