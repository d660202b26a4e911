"""Claims about other people's files and about secrets: nothing in weights, configs or data is run or obeyed, and no
token reaches a file or a line of output. Damaged and forged teachers are among bad_input_cases.py."""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from distill.checkpoint import damage_of
from pipelines import display
from pipelines.doctor import Finding, Level
from pipelines.terminal import printable
from tests.builders import FEW_STEPS, ROOT, TINY, run_cli, succeed, write_rows

SOURCES = [file for package in ("distill", "pipelines", "scripts") for file in sorted((ROOT / package).rglob("*.py"))]


def calls(source: str) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]


def dangers(source: str) -> list[str]:
    """Calls that would run what a file says."""
    found = []
    for call in calls(source):
        name, options = ast.unparse(call.func), {option.arg: ast.unparse(option.value) for option in call.keywords}
        if name in ("eval", "exec") or name.split(".")[0] in ("pickle", "dill", "marshal", "joblib"):
            found.append(name)
        if name == "torch.load" and options.get("weights_only") != "True":
            found.append(name)
        if name.startswith("yaml.") and "load" in name and options.get("Loader") != "_Loader" and "safe" not in name:
            found.append(name)
        if options.get("trust_remote_code", "False") != "False" or options.get("allow_pickle", "False") != "False":
            found.append(name)
        if options.get("shell", "False") != "False" or name == "os.system":
            found.append(name)
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_nothing_runs_what_a_file_says(file: Path) -> None:
    assert dangers(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.full_load(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "numpy.load(path, allow_pickle=True)",
        "pickle.loads(content)",
        "subprocess.run(command, shell=True)",
        "eval(text)",
    ],
)
def test_the_search_finds_what_would(source: str) -> None:
    assert dangers(source)


def test_the_loader_of_configs_is_the_safe_one() -> None:
    import yaml

    from distill.config import _Loader

    assert issubclass(_Loader, yaml.SafeLoader)


HOSTILE = "rain \x1b[2J\x1b]0;title\x07 [bold red]wind[/] \x9b31m\r<script>"


def test_control_characters_are_spelt_out() -> None:
    shown = printable(HOSTILE + "\n\tend é 雨")
    assert shown == "rain \\x1b[2J\\x1b]0;title\\x07 [bold red]wind[/] \\x9b31m\\r<script>\n\tend é 雨"


def test_texts_from_data_reach_the_terminal_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(display, "_console", lambda: Console(file=out, width=200, force_terminal=True))
    display.show_samples([(HOSTILE, HOSTILE)])
    display.show_finding(Finding(Level.WARNING, "rows", HOSTILE, HOSTILE))
    shown = out.getvalue()
    assert shown.count("[bold red]wind[/]") == 4, "read as markup"
    for character in ("\x1b[2J", "\x1b]0;", "\x07", "\x9b", "\r"):
        assert character not in shown


def test_a_message_about_a_row_cannot_steer_the_terminal(tmp_path: Path) -> None:
    rows = [{"text": "rain", "label": "ab"[row % 2]} for row in range(20)]
    file = write_rows(tmp_path / "a.jsonl", [*rows, {"text": "rain", "label": HOSTILE}])
    outcome = run_cli(
        TINY,
        "runtime.precision=fp32",
        "data.path=json",
        f"data.data_files.train={file}",
        "data.labels=[a, b]",
        "--dry-run",
    )
    assert outcome.status == 2
    assert "row 20 of train" in outcome.err
    assert "\x1b" not in outcome.err
    outcome = run_cli(TINY, "runtime.precision=fp32", "\x1b]0;title\x07=1", "--dry-run")
    assert outcome.status == 2
    assert "\x1b" not in outcome.err


SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_thisisasecretthatnobodymaysee",
    "AWS_SECRET_ACCESS_KEY": "anothersecretthatnobodymaysee",
}


def test_no_token_reaches_the_run_folder_or_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    short = ("--stages", "teacher", "tracking=[wandb]", "--output", tmp_path / "run")
    outcome = succeed(TINY, *FEW_STEPS, *short)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for secret in SECRETS.values():
        assert secret not in outcome.out + outcome.err
        assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_a_manifest_that_names_a_file_elsewhere_damages_its_checkpoint(tmp_path: Path) -> None:
    """Names are those of files below the checkpoint; others are not even looked at."""
    (tmp_path / "secret").write_text("x")
    checkpoint = tmp_path / "checkpoints" / "checkpoint-00000001"
    checkpoint.mkdir(parents=True)
    for name in ("../../secret", str(tmp_path / "secret")):
        manifest = {"files": {"state.json": {}, name: {"bytes": 1, "sha256": ""}}, "best": None}
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
        assert damage_of(checkpoint) == f"manifest.json names {name}, which lies elsewhere"
    manifest = {"files": {"state.json": {}}, "best": {"file": "../secret", "bytes": 1, "sha256": ""}}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert damage_of(checkpoint) == "manifest.json names ../secret, which lies elsewhere"
