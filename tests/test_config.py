"""Claims about distill/config.py: YAML and overrides become objects and YAML again, and a wrong key is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.config import Config, dump_config, load_config, parse_config
from distill.losses import AttentionLoss, TaskLosses
from distill.settings import UserError
from tests.builders import ROOT

CONFIGS = sorted(set((ROOT / "configs").rglob("*.yaml")) - set((ROOT / "configs" / "accelerate").iterdir()))


def config_file(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str, *overrides: str) -> Config:
    return load_config(config_file(folder, text), overrides)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_read_and_written_back(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert load(tmp_path, dump_config(config)) == config


def test_the_configs_are_those_that_are_promised() -> None:
    assert {path.stem for path in CONFIGS} >= {"bbc_news", "sst2", "mrpc", "stsb", "general_wikipedia", "tiny"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_says_nothing_twice_that_a_default_says(path: Path) -> None:
    """A YAML says only what differs: no top-level section equals its default."""
    written, default = yaml.safe_load(path.read_text(encoding="utf-8")), yaml.safe_load(dump_config(Config()))
    assert not [key for key, value in written.items() if value == default[key]]


def test_a_next_line_character_survives_the_way_through_yaml(tmp_path: Path) -> None:
    """YAML reads U+0085 in a plain or single-quoted text as a line break, and folds it to a space."""
    config = parse_config({"output": "a\x85b"})
    assert load_config(config_file(tmp_path, dump_config(config))) == config


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rate=st.floats(1e-8, 1.0),
    output=st.text(min_size=1),
    labels=st.none() | st.lists(st.text(min_size=1), min_size=2),
    pairs=st.none() | st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9))),
)
def test_any_values_survive_the_way_through_yaml(
    seed: int, rate: float, output: str, labels: list[str] | None, pairs: list[tuple[int, int]] | None
) -> None:
    values = {
        "seed": seed,
        "output": output,
        "data": {"labels": labels},
        "layer_map": {"pairs": pairs},
        "task": {"logits": {"learning_rate": rate}},
    }
    config = parse_config(values)
    assert config.output == output
    assert config.data.labels == labels
    assert parse_config(yaml.safe_load(dump_config(config))) == config


def test_overrides_reach_nested_keys_and_keep_their_neighbours(tmp_path: Path) -> None:
    text = "task: {logits: {epochs: 7, batch_size: 8}}\ndata: {path: json}"
    config = load(tmp_path, text, "task.logits.learning_rate=5e-5", "data.data_files.train=a.jsonl", "seed=3")
    assert config.task is not None
    assert config.task.logits is not None
    assert (config.task.logits.epochs, config.task.logits.batch_size) == (7, 8)
    assert config.task.logits.learning_rate == 5e-5
    assert config.data.data_files == {"train": "a.jsonl"}
    assert config.seed == 3


def test_an_override_fills_a_section_that_is_null(tmp_path: Path) -> None:
    config = load(tmp_path, "general: null", "general.training.max_steps=5", "teacher.training.epochs=2")
    assert config.general is not None
    assert config.general.training.max_steps == 5
    assert config.general.training.batch_size == 256
    assert config.teacher.training is not None
    assert config.teacher.training.epochs == 2


def test_an_override_with_a_mapping_or_null_replaces_the_section(tmp_path: Path) -> None:
    text = "general: {max_length: 64}\naugment: {copies: 3}"
    config = load(tmp_path, text, "general={streaming: true}", "augment=null")
    assert config.general is not None
    assert (config.general.streaming, config.general.max_length) == (True, 128)
    assert config.augment is None


@pytest.mark.parametrize("text", ["5e-5", "5.0e-5", "0.00005", "5E-5", "+5e-5"])
def test_small_numbers_are_read_however_they_are_written(text: str, tmp_path: Path) -> None:
    """YAML 1.1 takes 5e-5 for a string."""
    for config in (
        load(tmp_path, f"task: {{logits: {{learning_rate: {text}}}}}"),
        load(tmp_path, "{}", f"task.logits.learning_rate={text}"),
    ):
        assert config.task is not None
        assert config.task.logits is not None
        assert config.task.logits.learning_rate == 5e-5


def test_text_that_looks_like_a_number_stays_text(tmp_path: Path) -> None:
    config = load(tmp_path, "output: '2e5'\ndata: {labels: ['1e1', '1e2'], name: '20231101.en', text: e5}")
    assert config.output == "2e5"
    assert config.data.labels == ["1e1", "1e2"]
    assert (config.data.name, config.data.text) == ("20231101.en", "e5")
    assert load(tmp_path, dump_config(config)) == config


def test_a_loss_that_is_named_keeps_the_others(tmp_path: Path) -> None:
    config = load(tmp_path, "{}", "task.losses.attention.weight=2", "task.losses.hidden=null")
    assert config.task is not None
    losses = config.task.losses
    assert losses.attention == AttentionLoss(weight=2)
    assert losses.hidden is None
    assert losses == dataclasses.replace(TaskLosses(), attention=AttentionLoss(weight=2), hidden=None)


def test_a_value_may_hold_an_equals_sign(tmp_path: Path) -> None:
    assert load(tmp_path, "{}", "output=runs/a=b").output == "runs/a=b"


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": 1}, r"^sed: there is no such setting; did you mean seed\?"),
        ({"student": {"widht": 1}}, r"^student\.widht: .*did you mean student\.width\?"),
        (
            {"task": {"intermediate": {"learning_rat": 1}}},
            r"^task\.intermediate\.learning_rat: .*did you mean task\.intermediate\.learning_rate\?",
        ),
        (
            {"task": {"losses": {"logits": {"temprature": 2}}}},
            r"^task\.losses\.logits\.temprature: .*did you mean task\.losses\.logits\.temperature\?",
        ),
        (
            {"general": {"corpus": {"data_file": "x"}}},
            r"^general\.corpus\.data_file: .*did you mean general\.corpus\.data_files\?",
        ),
        ({"augment": {"copy": 2}}, r"^augment\.copy: .*did you mean augment\.copies\?"),
        ({"runtime": {"zzz": 1}}, r"^runtime\.zzz: there is no such setting; known here: precision, "),
        ({"student": {"layers": "four"}}, r"^student\.layers: .*integer.*not 'four'"),
        ({"student": {"layers": 0}}, r"^student\.layers: .*greater than 0, not 0"),
        ({"student": {"dropout": 1.5}}, r"^student\.dropout: .*less than 1, not 1\.5"),
        ({"student": 5}, r"^student: .*not 5"),
        ({"student": None}, r"^student: .*not None"),
        ({"runtime": {"precision": "fp8"}}, r"^runtime\.precision: .*'auto', 'fp32' or 'bf16', not 'fp8'"),
        ({"task": {"logits": {"learning_rate": -1e-5}}}, r"^task\.logits\.learning_rate: .*greater than 0"),
        ({"task": {"losses": {"hidden": {"weight": -1}}}}, r"^task\.losses\.hidden\.weight: .*greater than or equal"),
        ({"layer_map": {"pairs": [[0, 1]]}}, r"^layer_map\.pairs\.0\.0: .*greater than 0"),
        ({"data": {"labels": "a"}}, r"^data\.labels: .*list, not 'a'"),
        ({"data": {"data_files": 5}}, r"^data\.data_files: .*not 5"),
        ({"data": {"data_files": {"train": 5}}}, r"^data\.data_files: .*'train': 5"),
        ({"data": {"validation_split": 0}}, r"^data\.validation_split: .*greater than 0"),
        ({"data": {"max_length": 4}}, r"^data\.max_length: .*16"),
        ({"seed": -1}, r"^seed: .*greater than or equal to 0"),
        ({"tracking": "wandb"}, r"^tracking: .*list, not 'wandb'"),
        ({5: 1}, r"^5: keys should be strings"),
    ],
)
def test_a_wrong_value_names_its_key(values: dict[Any, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        parse_config(values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("a: [1", [], r"config\.yaml, line \d: not YAML"),
        ("- 1", [], r"config\.yaml: a config is a mapping of sections"),
        ("", [], r"config\.yaml: a config is a mapping of sections"),
        ("seed: 1\nseed: 2", [], r"config\.yaml, line 1: not YAML: 'seed' stands twice"),
        ("task:\n  logits: {epochs: 1, epochs: 2}", [], r"config\.yaml, line 2: not YAML: 'epochs' stands twice"),
        ("{}", ["seed"], r"'seed' is no override: write section\.key=value"),
        ("{}", ["=1"], r"'=1' is no override"),
        ("{}", ["seed.more=1"], r"^seed: .*not \{'more': 1\}"),
        ("seed: 1", ["seed.more=1"], r"'seed\.more=1': seed is a value, not a section"),
        ("{}", ["data.labels=[a"], r"data\.labels=\[a, line 1: not YAML"),
    ],
)
def test_what_is_no_config_is_refused(text: str, overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load(tmp_path, text, *overrides)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x9c")
    for path in (tmp_path / "absent.yaml", tmp_path, binary):
        with pytest.raises(UserError, match=f"{path.name}: .*(cannot be read|not YAML)"):
            load_config(path)
