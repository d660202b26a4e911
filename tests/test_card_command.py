"""Claims about what a reader does with a model card: its code runs, and `tinybert card` writes it again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from transformers import AutoModel

from distill import tiny
from distill.config import load_config
from distill.tasks import TASKS
from distill.teachers import weights_hash
from pipelines.card import card, write_card
from pipelines.card.usage import transformers_code
from tests.builders import finished_run, run_tinybert
from tests.conftest import BuildModel
from tests.test_card import facts, with_config, with_origins
from tests.test_export import copy_run

# Code


def run_code(source: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.chdir(folder)
    exec(compile(source, "card", "exec"), {})
    return capsys.readouterr().out


def fences(markdown: str, language: str) -> list[str]:
    return [t.content for t in MarkdownIt("commonmark").parse(markdown) if t.type == "fence" and t.info == language]


def test_the_code_in_the_card_answers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (source,) = fences(card(facts()).text, "python")
    said = run_code(source, finished_run(), monkeypatch, capsys)
    assert "'label': 'weather'" in said or "'label': 'music'" in said
    long = source.replace("The text to judge.", "rain " * 500)
    assert run_code(long, finished_run(), monkeypatch, capsys), "longer than the model has positions"


LABELS = {"question_answering": 2, "regression": 1}


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("task", [*TASKS, None])
def test_each_tasks_code_runs(
    task: str | None,
    pairs: bool,
    tmp_path: Path,
    build_model: BuildModel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kind = TASKS[task] if task is not None else None
    model = build_model(
        auto_class=kind.auto_class if kind is not None else AutoModel,
        vocab_size=len(tiny.tokenizer()),
        num_labels=LABELS.get(task or "", 3),
        problem_type=kind.problem_type if kind is not None else None,
    )
    model.save_pretrained(tmp_path / "student")
    tiny.tokenizer().save_pretrained(tmp_path / "student")
    settings = f"task.type={task}" if task is not None else "task=null"
    found = with_config(with_origins(facts(), labels=["B-a", "I-a", "O"], pairs=pairs), settings)
    assert run_code(transformers_code(found), tmp_path, monkeypatch, capsys).strip()


# The command


def test_the_card_again_keeps_its_settings_and_says_what_is_known_now(tmp_path: Path) -> None:
    run = copy_run(tmp_path)
    outcome = run_tinybert("card", run, "card.license=mit", "card.language=[de]")
    assert outcome.status == 0, outcome.err
    assert "card: " in outcome.out
    assert "README.md" in outcome.out
    data = ModelCard.load(run / "student" / "README.md").data
    assert (data.license, data.language) == ("mit", ["de"])
    assert load_config(run / "config.yaml").card.license == "mit"
    result = json.loads((run / "evaluate" / "result.json").read_text())
    result["student"]["metrics"]["accuracy"] = 0.1234
    (run / "evaluate" / "result.json").write_text(json.dumps(result))
    assert run_tinybert("card", run).status == 0
    assert (
        "0.1235" in (run / "student" / "README.md").read_text()
        or "0.1234" in (run / "student" / "README.md").read_text()
    )
    assert ModelCard.load(run / "student" / "README.md").data.license == "mit"


def test_a_card_that_says_the_same_is_left_alone(tmp_path: Path) -> None:
    run = copy_run(tmp_path)
    config = load_config(run / "config.yaml")
    path = write_card(config, run)
    assert path is not None
    before = path.stat().st_mtime_ns
    assert write_card(config, run) == path
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["seed=1"], "begin with card."),
        (["card.license=MIT License"], "card.license"),
        (["card.language=[english]"], "card.language"),
        (["card.name=a b"], "card.name"),
        (["card.licence=mit"], "did you mean card.license?"),
    ],
)
def test_wrong_settings_of_the_card_are_told(tmp_path: Path, overrides: list[str], words: str) -> None:
    run = copy_run(tmp_path)
    before = (run / "config.yaml").read_bytes()
    outcome = run_tinybert("card", run, *overrides)
    assert outcome.status == 2
    assert words in outcome.err
    assert (run / "config.yaml").read_bytes() == before


def test_a_student_that_was_not_exported_has_no_card(tmp_path: Path) -> None:
    run = copy_run(tmp_path)
    shutil.rmtree(run / "export")
    outcome = run_tinybert("card", run)
    assert outcome.status == 2
    assert f"tinybert export {run}" in outcome.err


def test_exporting_again_writes_the_card_again(tmp_path: Path) -> None:
    run = copy_run(tmp_path)
    (run / "student" / "README.md").unlink()
    assert run_tinybert("export", run).status == 0
    assert (run / "student" / "README.md").is_file()


def test_a_student_with_its_card_is_a_checkpoint_like_another(tmp_path: Path) -> None:
    """The card changes no hash by which a run knows its inputs."""
    student = shutil.copytree(finished_run() / "student", tmp_path / "student")
    before = weights_hash(str(student))
    (student / "README.md").write_text("another card")
    assert weights_hash(str(student)) == before
    assert torch.is_tensor(AutoModel.from_pretrained(student).get_input_embeddings().weight)
