"""Claims about distill/config.py: YAML and overrides become what they say, or the mistake is named."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from distill.config import Config, dump_config, load_config, parse_config
from distill.settings import UserError
from tests.builders import ROOT

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def _write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_parses_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert load_config(_write(tmp_path, dump_config(config))) == config


def test_the_shipped_configs_are_the_documented_ones() -> None:
    names = {path.stem for path in CONFIGS}
    assert {"bbc_news", "sst2", "mrpc", "stsb", "general_wikipedia", "tiny"} <= names


def test_an_empty_section_is_the_defaults() -> None:
    assert parse_config({}) == Config()
    assert parse_config({"student": {}}) == Config()


def test_an_override_of_one_key_keeps_the_others(tmp_path: Path) -> None:
    path = _write(tmp_path, "task: {intermediate: {epochs: 7, batch_size: 8}}\n")
    config = load_config(path, ["task.intermediate.epochs=2", "task.losses.logits.temperature=2"])
    assert config.task is not None
    assert config.task.intermediate is not None
    assert (config.task.intermediate.epochs, config.task.intermediate.batch_size) == (2, 8)
    assert config.task.losses.logits is not None
    assert config.task.losses.logits.temperature == 2
    assert list(config.task.losses.intermediate()) == ["embedding", "attention", "hidden"]


def test_null_switches_off_and_a_key_switches_on_again(tmp_path: Path) -> None:
    path = _write(tmp_path, "augment: null\ntask: {losses: {embedding: null}}\n")
    config = load_config(path, ["augment.copies=3", "general.streaming=true"])
    assert config.augment is not None
    assert config.augment.copies == 3
    assert config.general is not None
    assert config.task is not None
    assert config.task.losses.embedding is None


@pytest.mark.parametrize(("written", "value"), [("5e-5", 5e-5), ("1e-3", 1e-3), ("2E-4", 2e-4), ("0.01", 0.01)])
def test_a_rate_is_a_number_however_it_is_written(written: str, value: float, tmp_path: Path) -> None:
    # YAML 1.1 takes 5e-5 for a string.
    config = load_config(_write(tmp_path, f"teacher: {{training: {{learning_rate: {written}}}}}\n"))
    assert config.teacher.training is not None
    assert config.teacher.training.learning_rate == value


def test_a_file_name_that_looks_like_a_number_stays_text(tmp_path: Path) -> None:
    config = load_config(_write(tmp_path, "data: {data_files: 2e5.csv}\n"))
    assert config.data.data_files == "2e5.csv"


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Config().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": 1}, "sed: there is no such setting; did you mean seed"),
        ({"student": {"layer": 3}}, "student.layer: .* did you mean student.layers"),
        ({"general": {"corpus": {"pth": "text"}}}, "general.corpus.pth: .* did you mean general.corpus.path"),
        ({"task": {"losses": {"logits": {"temprature": 2}}}}, "task.losses.logits.temprature: .*logits.temperature"),
        ({"student": {"zzz": 3}}, "student.zzz: .* known here: layers, width"),
        ({"student": {"layers": 0}}, "student.layers: .*greater than 0, not 0"),
        ({"student": {"dropout": 1.0}}, "student.dropout: .*less than 1"),
        ({"seed": "many"}, "seed: .*integer.*'many'"),
        ({"task": {"losses": {"attention": {"weight": -1}}}}, "task.losses.attention.weight: .*greater than or equal"),
        ({"layer_map": {"strategy": "middle"}}, "layer_map.strategy: .*'uniform'"),
        ({"tracking": "wandb"}, "tracking: .*list"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(values)
