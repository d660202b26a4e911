"""Claims about two runs in one folder, and about a folder that cannot be written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator

from distill.settings import UserError
from pipelines.lock import NAME, FolderLock
from tests.builders import FEW_STEPS, TINY, contents, finished_run, run_cli, succeed


def new_lock(folder: Path) -> FolderLock:
    return FolderLock(folder, Accelerator())


def test_a_second_one_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    with new_lock(tmp_path) as first:
        first.take()
        first.take()
        with (
            new_lock(tmp_path) as second,
            pytest.raises(UserError, match=rf"output: another run \(process {os.getpid()} on .*\) is in {tmp_path}\."),
        ):
            second.take()
        assert (tmp_path / NAME).exists(), "the one that was refused must not remove it"
    with new_lock(tmp_path) as third:
        third.take()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_leaves_locks_nothing(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from accelerate import Accelerator; from pipelines.lock import *; "
        "lock = FolderLock(Path(sys.argv[1]), Accelerator(cpu=True)); lock.take(); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert killed.returncode == -9
    assert (tmp_path / NAME).exists()
    with new_lock(tmp_path) as lock:
        lock.take()


def test_a_file_that_the_first_removed_between_opening_and_locking_is_not_taken_for_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    real_open = os.open

    def open_and_lose(path: Path, *more: int) -> int:
        file = real_open(path, *more)
        if not opened:
            path.unlink()
        opened.append(file)
        return file

    monkeypatch.setattr("pipelines.lock.os.open", open_and_lose)
    with new_lock(tmp_path) as lock:
        lock.take()
        assert len(opened) == 2
        assert os.path.samestat(os.fstat(opened[1]), (tmp_path / NAME).stat())


def test_a_run_in_a_locked_folder_ends_with_2_and_changes_nothing(tmp_path: Path) -> None:
    folder = shutil.copytree(finished_run(), tmp_path / "run")
    with new_lock(folder) as other:
        other.take()
        before = contents(folder)
        outcome = run_cli(folder / "config.yaml", "tracking=[]", "--output", folder, "--redo", "export")
        assert outcome.status == 2
        assert "error: output: another run" in outcome.err
        assert contents(folder) == before
        # Looking is allowed.
        assert run_cli(folder / "config.yaml", "tracking=[]", "--output", folder, "--dry-run").status == 0
    succeed(folder / "config.yaml", "tracking=[]", "--output", folder)
    assert not (folder / NAME).exists()


def test_a_new_folder_is_locked_too(tmp_path: Path) -> None:
    with new_lock(tmp_path) as other:
        other.take()
        outcome = run_cli(TINY, *FEW_STEPS, "--output", tmp_path)
        assert outcome.status == 2
        assert "another run" in outcome.err
        assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the kernel says of a read-only disk; permissions do not bind the user root.
    monkeypatch.setattr("pipelines.pipeline.os.access", lambda place, mode: place != tmp_path)
    outcome = run_cli(TINY, *FEW_STEPS, "--output", tmp_path / "runs" / "new")
    assert outcome.status == 2
    assert f"output: {tmp_path} cannot be written" in outcome.err
    assert "--output" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_a_run_left_when_it_was_killed_at_once_is_none_of_somebody_else(tmp_path: Path) -> None:
    for name in (NAME, ".config.yaml.part"):
        (tmp_path / name).write_text("half")
    succeed(TINY, "runtime.precision=fp32", "--output", tmp_path, "--dry-run")
