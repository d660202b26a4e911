"""Claims about presets: they lie under what a config says, differ by the settings that docs/presets.md lists and no
others, and a run with the published code's recipe goes through."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.config import IntermediateTraining, TaskOptions, load_config, parse_config, to_plain
from distill.presets import under_preset
from distill.settings import UserError
from pipelines import task as task_stage
from tests.builders import FEW_STEPS, ROOT, TINY, finished_run, rows_of_phases, run_cli, succeed

PRESETS = ("default", "paper", "reference")
PHASE = "task.intermediate."


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, dict) and value
        found |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


def documented() -> dict[str, list[Any]]:
    """Setting -> values of the three presets, in the first table of docs/presets.md."""
    text = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8").split("## Where the task decides")[0]
    rows = re.findall(r"^\| `([a-z_.]+)` \| `(.+?)` \| `(.+?)` \| `(.+?)` \| .+ \|$", text, re.MULTILINE)
    return {name: [yaml.safe_load(value) for value in values] for name, *values in rows}


def resolved(preset: str, **values: Any) -> dict[str, Any]:
    return flat(to_plain(parse_config({"preset": preset, "general": {}, "augment": {}, **values})))


def test_the_table_is_what_the_presets_are_and_nothing_is_missing_from_it() -> None:
    presets = [resolved(name) for name in PRESETS]
    keys = sorted(set().union(*presets) - {"preset"})
    differing = {key: [values.get(key) for values in presets] for key in keys}
    differing = {key: values for key, values in differing.items() if values.count(values[0]) < len(values)}
    # Of the phase that default has not, the settings in which the others agree are those of the settings themselves.
    alike = {key for key, (_, *others) in differing.items() if PHASE in key and others[0] == others[1]}
    settings = flat(to_plain(TaskOptions().intermediate), PHASE)
    assert {key: differing.pop(key)[1] for key in sorted(alike)} == {key: settings[key] for key in sorted(alike)}
    told = {
        name: [float(v) if isinstance(v, str) and "e-" in v else v for v in row] for name, row in documented().items()
    }
    assert told == differing


def test_default_is_what_is_there_without_a_preset() -> None:
    assert parse_config({"preset": "default"}) == parse_config({})


@pytest.mark.parametrize("task", [{}, {"logits": {"epochs": 4}}, {"type": "regression"}])
def test_default_has_one_phase_at_the_rate_that_was_found(task: dict[str, Any]) -> None:
    found = parse_config({"task": task}).task
    assert found is not None
    assert found.logits is not None
    assert (found.intermediate, found.joint) == (None, True)
    assert (found.logits.batch_size, found.logits.learning_rate, found.logits.balance) == (16, 1e-3, "gradient")
    assert found.logits.epochs == task.get("logits", {}).get("epochs", 10)


@pytest.mark.parametrize("task", [{"intermediate": {}}, {"joint": False}, {"logits": None}])
def test_default_leaves_phases_alone_that_a_config_settles(task: dict[str, Any]) -> None:
    found = parse_config({"task": task}).task
    assert found == TaskOptions(
        **{**task, **({"intermediate": IntermediateTraining()} if "intermediate" in task else {})}
    )


@pytest.mark.parametrize(("name", "epochs"), [("cola", 50), ("mnli", 10), ("qqp", 10), ("qnli", 10), ("rte", 20)])
def test_the_papers_epochs_go_by_the_task(name: str, epochs: int) -> None:
    assert resolved("paper", data={"path": "glue", "name": name})["task.intermediate.epochs"] == epochs


def test_pairs_are_longer_in_the_paper() -> None:
    assert resolved("paper", data={"text": "a", "text_pair": "b"})["data.max_length"] == 128


@pytest.mark.parametrize(
    ("name", "copies"),
    [("cola", 30), ("mnli", 10), ("mrpc", 30), ("sst2", 20), ("stsb", 30), ("qqp", 10), ("other", 20)],
)
def test_the_codes_copies_go_by_the_task(name: str, copies: int) -> None:
    assert resolved("reference", data={"path": "glue", "name": name})["augment.copies"] == copies


def test_a_regression_learns_the_true_scores_from_the_original_rows_as_published() -> None:
    for preset, logits, augmented in (("paper", "kl", False), ("reference", None, False), ("default", "kl", True)):
        found = resolved(preset, task={"type": "regression"})
        assert found.get("task.losses.logits.form", None) == logits, preset
        assert ("task.losses.labels" in found and found["task.losses.labels"] is None) == (logits is not None)
        assert found["task.augmented_logits"] is augmented


def test_what_the_config_says_wins_and_what_it_leaves_out_comes_from_the_preset() -> None:
    config = load_config(TINY, ["preset=reference", "task.intermediate.schedule=cosine", "task.losses.hidden=null"])
    assert config.task is not None
    assert config.task.intermediate is not None
    assert config.task.intermediate.schedule == "cosine"
    assert config.task.intermediate.warmup_fraction == 0
    assert config.task.losses.hidden is None
    assert config.data.max_length == 32  # the file's own
    assert config.student.projection == "shared"


@pytest.mark.parametrize("preset", ["paper", "reference"])
def test_a_preset_switches_no_stage_on(preset: str) -> None:
    config = parse_config({"preset": preset})
    assert config.general is None
    assert config.augment is None
    assert parse_config({"preset": preset, "task": None}).task is None


@pytest.mark.parametrize("preset", PRESETS)
def test_a_resolved_config_read_again_is_the_same(preset: str, tmp_path: Path) -> None:
    config = parse_config({"preset": preset, "general": {}, "augment": None, "data": {"name": "cola"}})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_plain(config)), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("values", [{"preset": "best"}, {"preset": ["paper"]}, {"preset": "paper", "data": 3}])
def test_a_wrong_value_is_told_by_its_key(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"preset|data"):
        parse_config(values)


def test_the_values_given_are_left_as_they_are() -> None:
    values = {"preset": "reference", "task": {"losses": {"hidden": {"weight": 2}}}}
    merged = under_preset(values)
    assert values == {"preset": "reference", "task": {"losses": {"hidden": {"weight": 2}}}}
    assert merged["task"]["losses"]["hidden"] == {"padding": "included", "weight": 2}


def test_the_published_recipe_runs_padded_to_one_length_with_a_noisy_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: set[int] = set()
    modes: dict[str, set[bool]] = {"fit": set(), "validation": set()}
    fit, loss = task_stage.fit, task_stage.distillation_loss

    def watched_fit(student: Any, teacher: Any, objective: Any, batches: Any, *rest: Any, **options: Any) -> Any:
        modes["fit"].add(teacher.training)
        widths.update(batch["input_ids"].shape[1] for step in batches.steps(0, 2) for batch in step)
        return fit(student, teacher, objective, batches, *rest, **options)

    def watched_loss(student: Any, teacher: Any, *rest: Any) -> dict[str, float]:
        modes["validation"].add(teacher.training)
        return loss(student, teacher, *rest)

    monkeypatch.setattr(task_stage, "fit", watched_fit)
    monkeypatch.setattr(task_stage, "distillation_loss", watched_loss)
    # Of other width than the teacher: the shared projection has a matrix and a bias.
    succeed(TINY, *FEW_STEPS, "preset=reference", "--output", tmp_path / "run")
    assert widths == {32}
    assert modes == {"fit": {True}, "validation": {False}}


@pytest.mark.parametrize("augmented", [True, False])
def test_the_logits_phase_sees_augmented_rows_only_where_it_should(
    augmented: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of_phases(monkeypatch)
    succeed(TINY, *FEW_STEPS, f"task.augmented_logits={str(augmented).lower()}", "--output", tmp_path / "run")
    assert (rows["task.logits"] == rows["task.intermediate"]) is augmented
    assert rows["task.logits"] <= rows["task.intermediate"]


def test_another_dropout_of_the_teacher_is_another_run() -> None:
    same = (TINY, *FEW_STEPS, "tracking=[wandb, tensorboard]", "--output", finished_run(), "--dry-run")
    assert run_cli(*same).status == 0
    outcome = run_cli(*same, "teacher.dropout=true")
    assert outcome.status == 2
    assert "teacher.dropout: False -> True" in outcome.err
