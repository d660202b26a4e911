"""Claims about distill/tracking.py: metrics.jsonl has every figure, and so have an offline W&B run and TensorBoard.
The run that is read here is builders.finished_run()."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill.settings import UserError
from distill.tracking import Tracker, _init_options, check_trackers
from tests.builders import finished_run

LOSSES = {
    "teacher": ("labels",),
    "general": ("embedding", "attention", "hidden"),
    "task.intermediate": ("embedding", "attention", "hidden"),
    "task.logits": ("logits",),
    "evaluate.undistilled": ("labels",),
}
STEPS = {"teacher": 8, "general": 3, "task.intermediate": 6, "task.logits": 6, "evaluate.undistilled": 12}

# In a process of its own: only distill/tracking.py may import wandb here. wandb 0.31 writes its records as protocol
# buffers into a log of LevelDB's form, 32 KiB blocks of (checksum, length, kind, data), and has no reader in Python.
READER = """
import json, struct, sys
from wandb.proto.wandb_internal_pb2 import Record

def records(data):
    assert data[:4] == b":W&B"
    at, parts = 7, []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        if kind == 0:
            break
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(b"".join(parts))
            parts = []

def plain(items):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}

found = {"history": [], "config": {}, "summary": {}}
for record in records(open(sys.argv[1], "rb").read()):
    kind = record.WhichOneof("record_type")
    if kind == "history":
        found["history"].append(plain(record.history.item))
    elif kind in ("config", "summary"):
        found[kind] |= plain(getattr(record, kind).update)
    elif kind == "run":
        found["run"] = {"id": record.run.run_id, "name": record.run.display_name, "project": record.run.project}
        found["config"] |= plain(record.run.config.update)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    text = (finished_run() / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def wandb_run() -> dict[str, Any]:
    (file,) = finished_run().glob("wandb/offline-run-*/*.wandb")
    command = [sys.executable, "-c", READER, str(file)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)


def test_every_step_of_every_stage_is_a_row_with_every_loss(rows: list[dict[str, Any]]) -> None:
    for stage, losses in LOSSES.items():
        train = [row for row in rows if row["stage"] == stage and "train/loss" in row]
        assert [row["step"] for row in train] == list(range(1, STEPS[stage] + 1))
        names = {f"train/{name}" for name in ("loss", *losses, "learning_rate", "gradient_norm")}
        for row in train:
            assert names <= row.keys()
            assert all(math.isfinite(row[name]) for name in names)
            assert row["train/loss"] == pytest.approx(sum(row[f"train/{name}"] for name in losses), rel=1e-5)
        assert all(row["train/tokens_per_second"] > 0 for row in train)


def test_validation_figures_are_rows_too(rows: list[dict[str, Any]]) -> None:
    for stage, figure in {"teacher": "accuracy", "task.intermediate": "loss", "task.logits": "f1_macro"}.items():
        assert [row for row in rows if row["stage"] == stage and f"validation/{figure}" in row]


def test_one_step_counts_through_all_stages(rows: list[dict[str, Any]]) -> None:
    totals = [row["total_step"] for row in rows]
    assert totals == sorted(totals)
    assert totals[-1] == sum(STEPS.values())
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)


def test_the_offline_wandb_run_has_the_curves(wandb_run: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    for stage, losses in LOSSES.items():
        for name in ("loss", *losses, "learning_rate", "tokens_per_second", "gradient_norm"):
            key = f"{stage}/train/{name}"
            curve = [(row["_step"], row[key]) for row in wandb_run["history"] if key in row]
            own = [row for row in rows if row["stage"] == stage and f"train/{name}" in row]
            assert curve == [(row["total_step"], pytest.approx(row[f"train/{name}"])) for row in own], key
    assert any("task.logits/validation/accuracy" in row for row in wandb_run["history"])


def test_the_offline_wandb_run_has_config_and_summary(wandb_run: dict[str, Any]) -> None:
    resolved = yaml.safe_load((finished_run() / "config.yaml").read_text(encoding="utf-8"))
    config = wandb_run["config"]
    assert config["seed"] == resolved["seed"]
    assert config["student.layers"] == resolved["student"]["layers"]
    assert config["task.intermediate.learning_rate"] == resolved["task"]["intermediate"]["learning_rate"]
    summary = json.loads((finished_run() / "summary.json").read_text(encoding="utf-8"))
    assert wandb_run["summary"]["retention"] == summary["retention"]
    for who in ("teacher", "student", "undistilled_student"):
        assert wandb_run["summary"][f"{who}.metrics.accuracy"] == summary[who]["metrics"]["accuracy"]
    assert wandb_run["run"]["project"] == "tinybert-distill"
    assert wandb_run["run"]["name"] == "run"


def test_tensorboard_by_name_has_the_same_curves(rows: list[dict[str, Any]]) -> None:
    files = [file for file in finished_run().rglob("events.out.tfevents.*") if "hparams" not in file.name]
    scalars: dict[str, list[tuple[int, float]]] = {}
    for file in files:
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            scalars.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    own = [row for row in rows if row["stage"] == "general"]
    assert scalars["general/train/hidden"] == [
        (row["total_step"], pytest.approx(row["train/hidden"], rel=1e-6)) for row in own
    ]


def opened(folder: Path) -> Tracker:
    tracker = Tracker(Accelerator(), folder, [])
    tracker.start({}, "project")
    return tracker


def total_steps_of(folder: Path) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["total_step"] for line in lines]


def test_a_run_that_goes_on_keeps_its_line_of_steps(tmp_path: Path) -> None:
    first = opened(tmp_path)
    first.begin_stage("general", 0)
    for step in (1, 2, 3):
        first.log("general", step, {"loss": 1.0})
    first.begin_stage("task", 0)
    for step in (1, 2, 3):
        first.log("task", step, {"loss": 1.0})
    again = opened(tmp_path)  # killed after step 3, the last checkpoint was after step 2
    again.begin_stage("task", 2)
    for step in (3, 4):
        again.log("task", step, {"loss": 1.0})
    again.begin_stage("evaluate", 0)
    again.log("evaluate", 1, {"loss": 1.0})
    assert total_steps_of(tmp_path) == [1, 2, 3, 4, 5, 6, 6, 7, 8]
    redone = opened(tmp_path)
    redone.begin_stage("task", 0)
    redone.log("task", 1, {"loss": 1.0})
    assert total_steps_of(tmp_path)[-1] == 9


def test_a_row_that_a_kill_cut_off_spoils_no_other(tmp_path: Path) -> None:
    first = opened(tmp_path)
    first.begin_stage("task", 0)
    first.log("task", 1, {"loss": math.nan})
    with first.path.open("a", encoding="utf-8") as file:
        file.write('{"stage": "task", "st')
    again = opened(tmp_path)
    again.begin_stage("task", 1)
    again.log("task", 2, {"loss": 1.0})
    rows = [json.loads(line) for line in first.path.read_text(encoding="utf-8").splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, None), (2, 1.0)], "not finite is no JSON"


def test_a_run_keeps_its_wandb_id(tmp_path: Path) -> None:
    first, second = (_init_options(["wandb"], tmp_path)["wandb"]["id"] for _ in range(2))
    assert first == second


def test_wandb_is_offline_without_a_login_and_online_with_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mode() -> str:
        return _init_options(["wandb"], tmp_path)["wandb"]["mode"]

    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert mode() == "offline"
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password secret\n", encoding="utf-8")
    netrc.chmod(0o600)
    assert mode() == "online"
    netrc.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert mode() == "disabled"


def test_an_unknown_or_absent_tracker_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"tracking: 'wandbb' is no tracker; use wandb, tensorboard"):
        check_trackers(["wandbb"])
    monkeypatch.setattr("distill.tracking.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tracking: aim is not installed; run `pip install aim`"):
        check_trackers(["aim"])
