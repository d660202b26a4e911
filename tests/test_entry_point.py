"""Claims about scripts/distill.py and pipelines/cli.py: how a run starts, and the status with which it ends.
Whole runs under `accelerate launch` are test_distributed.py's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from distill.interruption import Interruption
from pipelines import cli, pipeline
from tests.builders import FEW_STEPS, ROOT, TINY, Outcome, contents, run_cli, succeed

SCRIPT = ROOT / "scripts" / "distill.py"


def python(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("folder", ["elsewhere", "scripts"])
def test_the_script_does_not_take_itself_for_the_library(folder: str, tmp_path: Path) -> None:
    """scripts/ stands first on the path when the script starts, and holds a distill.py."""
    program = (
        f"import runpy, sys; sys.path.insert(0, {str(SCRIPT.parent)!r});"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='imported');"
        "import distill, pipelines; print(distill.__path__[0], pipelines.__path__[0])"
    )
    outcome = python("-c", program, cwd=SCRIPT.parent if folder == "scripts" else tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.split() == [str(ROOT / "distill"), str(ROOT / "pipelines")]


def test_help_answers_at_once_and_names_the_options(tmp_path: Path) -> None:
    program = (
        f"import runpy, sys; sys.argv = [{str(SCRIPT)!r}, '--help']\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    )
    outcome = python("-c", program, cwd=tmp_path)
    assert outcome.stdout.splitlines()[-1] == "0 False", outcome.stderr
    for option in ("--output", "--stages", "--redo", "--dry-run"):
        assert option in outcome.stdout


def test_relative_names_start_at_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.yaml").write_text(Path(TINY).read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    outcome = succeed("own.yaml", *FEW_STEPS, "--output", "runs/here", "--stages", "general")
    assert "run folder runs/here" in outcome.out
    assert (tmp_path / "runs" / "here" / "general" / "result.json").is_file()


def test_the_command_line_output_replaces_the_files(tmp_path: Path) -> None:
    outcome = succeed(TINY, *FEW_STEPS, f"output={tmp_path / 'a'}", "--output", tmp_path / "b", "--dry-run")
    assert str(tmp_path / "b") in outcome.out.replace("\n", "")


def ends(arguments: tuple[str | Path, ...], raised: BaseException) -> Outcome:
    with mock.patch.object(pipeline.GeneralStage, "run", side_effect=raised):
        return run_cli(TINY, *FEW_STEPS, "--stages", "general", *arguments)


def test_a_failure_that_is_not_the_users_ends_with_1_and_its_traceback(tmp_path: Path) -> None:
    outcome = ends(("--output", tmp_path / "run"), RuntimeError("disk on fire"))
    assert outcome.status == 1
    assert "Traceback" in outcome.err
    assert "RuntimeError: disk on fire" in outcome.err
    # What it had begun, it goes on with.
    assert not (tmp_path / "run" / "general" / "result.json").exists()
    succeed(TINY, *FEW_STEPS, "--stages", "general", "--output", tmp_path / "run")


@pytest.mark.parametrize(
    "arguments",
    [(), (TINY, "--nonsense"), (TINY, "--stages"), (TINY, "--output")],
    ids=["nothing", "unknown option", "no stages", "no output"],
)
def test_a_wrong_command_line_ends_with_2(arguments: tuple[str, ...]) -> None:
    outcome = run_cli(*arguments)
    assert outcome.status == 2
    assert "Error" in outcome.err
    assert all(argument in outcome.err for argument in arguments[1:] or arguments)
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_after_saving(signum: int, status: int, tmp_path: Path) -> None:
    class Arriving(Interruption):
        def requested(self) -> int:
            if self.steps == 2:
                signal.raise_signal(signum)
            self.steps += 1
            return super().requested()

        steps = 0

    with mock.patch("pipelines.run.Interruption", Arriving):
        outcome = run_cli(TINY, *FEW_STEPS, "--stages", "general", "--output", tmp_path)
    assert outcome.status == status
    assert f"{signal.Signals(signum).name}: the run stopped after saving; start it again to go on" in outcome.err
    assert [path.name for path in (tmp_path / "general" / "checkpoints").iterdir()] == ["checkpoint-00000002"]


def test_the_console_command_has_the_same_run(tmp_path: Path) -> None:
    command = ["tinybert", "run", TINY, *FEW_STEPS, "--output", str(tmp_path / "run"), "--dry-run"]
    with mock.patch.object(sys, "argv", command), pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert contents(tmp_path) == {}
