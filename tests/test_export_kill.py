"""Claims about an export that is killed: whatever file operation it was at, student/ and artefacts/ are those from
before, those from after or not there, and artefacts are never beside another student than their own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from safetensors.torch import load_file, save_file

from distill.config import load_config
from pipelines.export import ExportStage
from pipelines.run import Run, open_run
from tests.builders import FEW_STEPS, TINY, succeed

OPERATIONS = ("rename", "unlink", "rmdir", "mkdir")
WEIGHTS = "model.safetensors"


class Killed(BaseException):
    pass


class Workshop:
    """Stands in for the real one: an artefact that says whose it is."""

    def __init__(self, run: Run, rows: Any, model: Any, folder: Path) -> None:
        self.folder, self.bias = folder, model.classifier.bias[0].item()

    def make(self, formats: Any, max_int8_loss_points: float) -> dict[str, Any]:
        for name in formats:
            (self.folder / name).mkdir()
            (self.folder / name / "model.onnx").write_text(str(self.bias))
            (self.folder / name / "metadata.json").write_text(str(self.bias))
        return {}


@contextmanager
def killed_at(operation: int | None) -> Iterator[list[str]]:
    """The process is dead from its nth file operation on: it does no other. None: it lives. What it did is listed."""
    done: list[str] = []

    def fatal(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def act(*arguments: Any, **options: Any) -> Any:
            if len(done) == operation:
                raise Killed
            done.append(name)
            return real(*arguments, **options)

        return act

    with ExitStack() as patches:
        for name in OPERATIONS:
            patches.enter_context(mock.patch.object(os, name, fatal(name, getattr(os, name))))
        yield done


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose student was exported with artefacts, and then trained anew."""
    monkeypatch.setattr("pipelines.artefacts.Workshop", Workshop)
    folder = tmp_path / "run"
    succeed(TINY, *FEW_STEPS, "general=null", "augment=null", "evaluate.undistilled=false", "--output", folder)
    config = load_config(folder / "config.yaml", ["export.to=[onnx, int8]", f"output='{folder}'"])
    run = open_run(config)
    ExportStage().run(run)
    weights = load_file(folder / "task" / "student" / WEIGHTS)
    weights["classifier.bias"] += 1
    save_file(weights, folder / "task" / "student" / WEIGHTS, metadata={"format": "pt"})
    return run


def test_an_export_killed_at_any_file_operation_leaves_no_mix(run: Run, tmp_path: Path) -> None:
    before = shutil.copytree(run.folder, tmp_path / "before")
    with killed_at(None) as all_operations:
        ExportStage().run(run)
    whole = _content(run.folder)

    def state(name: str) -> str:
        found = _content(run.folder / name)
        if not (run.folder / name).exists():
            return "gone"
        return "old" if found == _content(before / name) else "new" if found == after[name] else "mixed"

    after = {name: _content(run.folder / name) for name in ("student", "artefacts")}
    assert all(after[name] != _content(before / name) for name in after)
    seen = []
    for operation in range(len(all_operations)):
        shutil.rmtree(run.folder)
        shutil.copytree(before, run.folder)
        with pytest.raises(Killed), killed_at(operation):
            ExportStage().run(run)
        seen.append((state("student"), state("artefacts")))
        ExportStage().run(run)
        assert _content(run.folder) == whole, "something of the killed one is left"
    order = [("old", "old"), ("old", "gone"), ("gone", "gone"), ("new", "gone")]  # the last operation of all ends it
    assert list(dict.fromkeys(seen)) == order
    assert seen == sorted(seen, key=order.index)
