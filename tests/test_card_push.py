"""Claims about `tinybert card --push`, against a hub on loopback: what lies there afterwards is what lies in the run,
and whatever goes wrong is told with a remedy. What the card says is test_card.py's."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

from distill.config import load_config
from pipelines.card import publish
from tests.builders import ROOT, Outcome, run_tinybert
from tests.fake_hub import TOKEN, Hub, running_hub
from tests.test_export import copy_run


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process pushes to, with a token."""
    with running_hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return copy_run(tmp_path)


def add_artefacts(run: Path, *formats: str) -> None:
    """What an export would have left; here the bytes do not matter."""
    result = json.loads((run / "export" / "result.json").read_text())
    agreement = {"rows": 48, "largest_difference": 1e-3, "differing_predictions": 0}
    for name in formats:
        (run / "artefacts" / name).mkdir(parents=True)
        (run / "artefacts" / name / "model.onnx").write_bytes(name.encode() * 100)
        (run / "artefacts" / name / "metadata.json").write_text("{}")
        figures = {"bytes": 100, "validation": {"accuracy": 0.5}, "agreement": agreement}
        result.setdefault("artefacts", {})[name] = figures
    (run / "export" / "result.json").write_text(json.dumps(result))


def pushed(*arguments: str | Path) -> Outcome:
    outcome = run_tinybert("card", *arguments)
    assert outcome.status == 0, outcome.err
    return outcome


def refused(*arguments: str | Path) -> str:
    outcome = run_tinybert("card", *arguments)
    assert outcome.status == 2, outcome.err
    assert "Traceback" not in outcome.err
    assert TOKEN not in outcome.out + outcome.err
    return outcome.err


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_lies_on_the_hub_is_the_students_folder(hub: Hub, run_folder: Path) -> None:
    outcome = pushed(run_folder, "--push", "me/bbc-tinybert", "--private")
    assert "pushed to me/bbc-tinybert" in outcome.out
    assert hub.private == {"me/bbc-tinybert": True}
    there = hub.repositories["me/bbc-tinybert"]
    assert there.pop(".gitattributes")
    assert there == files(run_folder / "student")
    weights = (run_folder / "student" / "model.safetensors").read_bytes()
    assert hub.stored == {hashlib.sha256(weights).hexdigest(): weights}, "weights go to large-file storage, alone"
    assert hub.commits == 1, "student and card come together"


def test_the_pushed_card_names_the_repository_and_was_validated(hub: Hub, run_folder: Path) -> None:
    pushed(run_folder, "card.license=apache-2.0", "--push", "bbc-tinybert")
    content = hub.repositories["me/bbc-tinybert"]["README.md"].decode()
    assert hub.validated == [content]
    assert 'model="me/bbc-tinybert"' in content
    found = ModelCard(content).data
    assert (found.license, found.model_name) == ("apache-2.0", "bbc-tinybert")
    assert load_config(run_folder / "config.yaml").card.name == "me/bbc-tinybert", "a later card keeps the name"
    assert hub.private == {"me/bbc-tinybert": False}


def test_artefacts_go_along_where_asked_for_and_old_ones_leave(hub: Hub, run_folder: Path) -> None:
    run = run_folder
    add_artefacts(run, "onnx", "int8")
    hub.repositories["me/x"] = {"artefacts/openvino/model.xml": b"of a student before", "LICENSE": b"somebody's"}
    pushed(run, "--push", "me/x", "--artefacts")
    there = dict(hub.repositories["me/x"])
    assert there.pop("LICENSE") == b"somebody's"
    artefacts = {f"artefacts/{name}": content for name, content in files(run / "artefacts").items()}
    assert there == {**files(run / "student"), **artefacts}
    assert "snapshot_download" in there["README.md"].decode()
    assert load_config(run / "config.yaml").card.artefacts
    assert hub.commits == 1
    pushed(run, "--push", "me/x", "--no-artefacts")
    there = dict(hub.repositories["me/x"])
    assert not [name for name in there if name.startswith("artefacts/")]
    assert "onnxruntime" not in there["README.md"].decode(), "the card promises what lies beside it"


def test_a_second_push_of_the_same_changes_nothing(hub: Hub, run_folder: Path) -> None:
    pushed(run_folder, "--push", "me/x")
    before = dict(hub.repositories["me/x"])
    hub.refuse["PUT "] = (500, "nothing is to be stored again")
    hub.refuse["POST /api/models/me/x/commit"] = (500, "nothing is to be committed")
    pushed(run_folder, "--push", "me/x")
    assert hub.repositories["me/x"] == before
    assert hub.commits == 1


@pytest.mark.parametrize(
    ("start", "status", "words"),
    [
        ("POST /api/repos/create", 403, ("may not write there", "right to write")),
        ("POST /api/repos/create", 401, ("does not know the token", "hf auth login")),
        ("POST /api/validate-yaml", 400, ("refuses the card", "section `card`")),
        ("POST /api/models/me/x/commit", 403, ("may not write there",)),
        ("PUT /storage", 403, ("could not be uploaded", "Give the same command again")),
    ],
)
def test_what_the_hub_refuses_is_told_with_a_remedy(
    hub: Hub, run_folder: Path, start: str, status: int, words: tuple[str, ...]
) -> None:
    hub.refuse[start] = (status, "the hub's own words")
    error = refused(run_folder, "--push", "me/x")
    assert error.startswith("error: --push me/x: ")
    for part in words:
        assert part in error
    assert hub.commits == 0


def test_without_a_token_nothing_is_asked(hub: Hub, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "get_token", lambda: None)
    error = refused(run_folder, "--push", "me/x")
    assert "there is no token" in error
    assert "hf auth login" in error
    assert hub.requests == []


def test_offline_is_told(hub: Hub, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(run_folder, "--push", "me/x")
    assert hub.requests == []


def test_a_hub_that_is_not_there_is_told(hub: Hub, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # discard; nobody listens
    assert "http://127.0.0.1:9 cannot be reached" in refused(run_folder, "--push", "me/x")


@pytest.mark.parametrize("name", ["me/x/y", "-x", "a b", "x.git"])
def test_a_name_that_is_none_is_refused_before_anything_is_asked(hub: Hub, run_folder: Path, name: str) -> None:
    before = (run_folder / "config.yaml").read_bytes()
    assert "no name of a repository" in refused(run_folder, f"--push={name}")
    assert hub.requests == []
    assert (run_folder / "config.yaml").read_bytes() == before


def test_artefacts_that_are_not_there_are_told(hub: Hub, run_folder: Path) -> None:
    assert "--to onnx,int8" in refused(run_folder, "--push", "me/x", "--artefacts")
    assert hub.requests == []


def test_how_to_push_needs_a_push(run_folder: Path) -> None:
    assert "Add --push" in refused(run_folder, "--private")


def test_the_token_reaches_neither_the_run_nor_the_hubs_files(hub: Hub, run_folder: Path) -> None:
    pushed(run_folder, "--push", "me/x")
    for content in (*files(run_folder).values(), *hub.repositories["me/x"].values()):
        assert TOKEN.encode() not in content


@pytest.mark.slow
def test_the_command_itself_pushes(run_folder: Path) -> None:
    """In a process of its own, told by environment variables alone, as a user would."""
    with running_hub() as hub:
        environment = {
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
            "HOME": str(run_folder.parent),
            "PATH": "/usr/bin:/bin",
        }
        command = [sys.executable, "-c", "from pipelines.cli import main; main()", "card", str(run_folder)]
        done = subprocess.run(
            [*command, "--push", "me/x"],
            env=environment,
            cwd=run_folder.parent,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        there = dict(hub.repositories["me/x"])
        there.pop(".gitattributes")
        assert there == files(run_folder / "student")
