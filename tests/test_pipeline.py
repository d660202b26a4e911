"""Claims about a whole run: the contracted files, skipping, redoing, dry runs, every config and task type."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel

from distill.interruption import Interruption
from tests.builders import FEW_STEPS, ROOT, TINY, contents, finished_run, run_cli, succeed, write_rows

SMALL = (
    "teacher.model=tiny-random",
    "student.layers=2",
    "student.width=24",
    "student.heads=4",
    "student.intermediate_size=48",
    "runtime.precision=fp32",
    "runtime.cpu_threads=1",
)
PHASES = (
    "teacher.training={max_steps: 4, batch_size: 16, learning_rate: 3e-3}",
    "task.intermediate={max_steps: 3, batch_size: 16}",
    "task.logits={max_steps: 3, batch_size: 16}",
    "evaluate.undistilled=false",
)
WORDS = ["rain", "wind", "song", "piano", "people", "often", "talk", "long", "morning", "walk", "near", "our", "town"]


def _text(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(4, 9)))


def _splits(folder: Path, make: object, count: int = 40) -> list[str]:
    draw = random.Random(0)
    return ["data.path=json"] + [
        f"data.data_files.{split}={write_rows(folder / f'{split}.jsonl', [make(draw, i) for i in range(count)])}"  # type: ignore[operator]
        for split in ("train", "validation", "test")
    ]


def test_a_run_leaves_the_contracted_files() -> None:
    folder = finished_run()
    summary = json.loads((folder / "summary.json").read_text())
    for who in ("teacher", "student", "undistilled_student"):
        assert {"metrics", "parameters", "bytes", "latency_ms"} <= summary[who].keys()
    expected = summary["student"]["metrics"]["accuracy"] / summary["teacher"]["metrics"]["accuracy"]
    assert summary["retention"] == pytest.approx(expected)
    for stage in ("teacher", "general", "augment", "task", "evaluate", "export"):
        result = json.loads((folder / stage / "result.json").read_text())
        assert result["seconds"] >= 0
        assert len(result["key"]) == 64
    assert yaml.safe_load((folder / "config.yaml").read_text())["student"]["width"] == 24
    assert not list(folder.rglob("checkpoint-*")), "checkpoints of finished stages are cleared"


def test_the_student_loads_where_this_project_is_not(tmp_path: Path) -> None:
    program = """
import json, sys, importlib.util
assert importlib.util.find_spec("pipelines") is None
from transformers import AutoModelForSequenceClassification, pipeline
classify = pipeline("text-classification", sys.argv[1])
print(json.dumps([classify("rain and wind")[0]["label"], classify.model.config.id2label,
                  sorted(n for n in classify.model.state_dict() if "projection" in n)]))
"""
    # -P and -S would hide site-packages; an editable install is hidden by removing its finder's path.
    hide = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in type(f).__module__.lower() "
    hide += "and 'editable' not in getattr(f, '__name__', '').lower()]; "
    hide += f"sys.path = [p for p in sys.path if p != {str(ROOT)!r}]\n"
    run = subprocess.run(
        [sys.executable, "-c", hide + program, str(finished_run() / "student")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    label, names, projections = json.loads(run.stdout.splitlines()[-1])
    assert label in ("weather", "music")
    assert names == {"0": "weather", "1": "music"}
    assert projections == []


def test_a_second_run_of_the_resolved_config_skips_everything(tmp_path: Path) -> None:
    folder = shutil.copytree(finished_run(), tmp_path / "run")
    weights = (folder / "student" / "model.safetensors").stat().st_mtime_ns
    outcome = succeed(folder / "config.yaml", "tracking=[]", "--output", folder)
    assert outcome.out.count("done before, skipped") == 6
    assert (folder / "student" / "model.safetensors").stat().st_mtime_ns == weights


def test_redo_renews_a_stage_and_what_follows_from_it(tmp_path: Path) -> None:
    folder = shutil.copytree(finished_run(), tmp_path / "run")
    outcome = succeed(folder / "config.yaml", "tracking=[]", "--output", folder, "--redo", "evaluate")
    assert outcome.out.count("done before, skipped") == 5
    changed = succeed(
        folder / "config.yaml", "tracking=[]", "task.logits.learning_rate=1e-4", "--output", folder, "--redo", "task"
    )
    for skipped in ("teacher", "general", "augment"):
        assert f"{skipped}: done before, skipped" in changed.out
    for renewed in ("task", "evaluate", "export"):
        assert f"{renewed}: done before, skipped" not in changed.out


def test_a_dry_run_plans_and_writes_nothing(tmp_path: Path) -> None:
    outcome = succeed(TINY, *FEW_STEPS, "--output", tmp_path / "run", "--dry-run")
    assert "task.intermediate" in outcome.out
    assert "student 1 2 <- teacher 2 4" in outcome.out
    assert list(tmp_path.iterdir()) == []


def test_stages_run_alone_in_turn(tmp_path: Path) -> None:
    succeed(TINY, *FEW_STEPS, "--output", tmp_path, "--stages", "teacher")
    before = contents(tmp_path / "teacher")
    succeed(TINY, *FEW_STEPS, "--output", tmp_path, "--stages", "general,augment")
    assert contents(tmp_path / "teacher") == before
    assert not (tmp_path / "task").exists()


def student_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


def require_same_student(folder: Path, other: Path) -> None:
    own, others = student_weights(folder), student_weights(other)
    assert own.keys() == others.keys()
    assert not [name for name in own if not torch.equal(own[name], others[name])]


def test_the_resolved_config_repeats_the_run_to_the_bit_also_stage_by_stage(tmp_path: Path) -> None:
    for stages in ("teacher", "general", "augment,task", "evaluate,export"):
        arguments = ("tracking=[]", "--output", tmp_path / "again", "--stages", stages)
        succeed(finished_run() / "config.yaml", *arguments)
    require_same_student(tmp_path / "again", finished_run())
    summaries = [json.loads((run / "summary.json").read_text()) for run in (finished_run(), tmp_path / "again")]
    for who in ("teacher", "student", "undistilled_student"):
        assert summaries[0][who]["metrics"] == summaries[1][who]["metrics"]


def test_a_run_that_is_stopped_again_and_again_ends_with_the_same_student(tmp_path: Path) -> None:
    """Stops fall into every stage that trains, between stages, and into the border of the two task phases."""

    class StopsAfterSeven(Interruption):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.asked = 0

        def requested(self) -> int:
            self.asked += 1
            return signal.SIGTERM if self.asked > 7 else 0

    config, statuses = finished_run() / "config.yaml", []
    with mock.patch("pipelines.run.Interruption", StopsAfterSeven):
        while not statuses or statuses[-1] == 143:
            outcome = run_cli(config, "tracking=[]", "--output", tmp_path / "run")
            statuses.append(outcome.status)
            torch.manual_seed(len(statuses))  # a new process begins with other random numbers
    assert statuses[-1] == 0, outcome.err[-3000:]
    assert len(statuses) > 4
    require_same_student(tmp_path / "run", finished_run())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    whole = [json.loads(line) for line in (finished_run() / "metrics.jsonl").read_text().splitlines()]
    for row, expected in zip(rows, whole, strict=True):
        for name in ("stage", "step", "total_step"):
            assert row[name] == expected[name]


def test_a_killed_run_says_what_changed_and_can_be_redone(tmp_path: Path) -> None:
    folder = shutil.copytree(finished_run(), tmp_path / "run")
    (folder / "task" / "result.json").unlink()  # as if killed in the task stage
    changed = ("tracking=[]", "task.logits.max_steps=2", "--output", folder)
    outcome = run_cli(folder / "config.yaml", *changed)
    assert outcome.status == 2
    assert "task.logits.max_steps: 6 -> 2" in outcome.err
    assert "--redo task" in outcome.err
    succeed(folder / "config.yaml", *changed, "--redo", "task")
    assert json.loads((folder / "task" / "result.json").read_text())["phases"]["logits"]["steps"] == 2


def test_a_result_that_cannot_be_read_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = shutil.copytree(finished_run(), tmp_path / "run")
    (folder / "export" / "result.json").write_text('{"key": ')
    outcome = succeed(folder / "config.yaml", "tracking=[]", "--output", folder)
    assert outcome.out.count("done before, skipped") == 5
    assert "export/result.json is damaged" in caplog.text
    assert json.loads((folder / "export" / "result.json").read_text())["files"]


def test_a_loss_that_is_not_finite_ends_with_1_and_the_rows_are_written(tmp_path: Path) -> None:
    exploding = "teacher.training={max_steps: 8, batch_size: 16, learning_rate: 1e30, log_every_steps: 1}"
    outcome = run_cli(TINY, *FEW_STEPS, exploding, "--output", tmp_path / "run", "--stages", "teacher")
    assert outcome.status == 1
    assert "Traceback" not in outcome.err
    assert "error: teacher: the loss is nan at step" in outcome.err
    assert "runtime.on_nonfinite=skip" in outcome.err
    [row] = [json.loads(line) for line in (tmp_path / "run" / "skipped_steps.jsonl").read_text().splitlines()]
    assert row["stage"] == "teacher"
    assert len(row["rows"]) == 16
    assert set(row["rows"]) <= set(range(192))
    assert "loss" in row["not_finite"]


def test_a_streamed_corpus_of_plain_text(tmp_path: Path) -> None:
    draw = random.Random(0)
    (tmp_path / "corpus.txt").write_text("\n".join(_text(draw) for _ in range(60)))
    overrides = [
        "general.corpus.path=text",
        f"general.corpus.data_files={tmp_path / 'corpus.txt'}",
        "general.streaming=true",
        "task=null",
        "augment=null",
    ]
    succeed(TINY, *FEW_STEPS[:1], *overrides, "general.training.max_steps=3", "--output", tmp_path / "run")
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "run" / "general" / "result.json").read_text())["steps"] == 3


@pytest.mark.parametrize("name", ["sst2", "mrpc", "stsb"])
def test_a_hub_config_runs_on_local_files(name: str, tmp_path: Path) -> None:
    pair = name != "sst2"

    def make(draw: random.Random, index: int) -> dict[str, object]:
        label = index % 2 if name != "stsb" else index % 6 / 1.0
        texts = {"sentence1": _text(draw), "sentence2": _text(draw)} if pair else {"sentence": _text(draw)}
        return {**texts, "label": label}

    outcome = run_cli(
        ROOT / "configs" / f"{name}.yaml",
        *_splits(tmp_path, make),
        "data.name=null",
        "data.max_length=32",
        *SMALL,
        *PHASES,
        "general=null",
        "augment={copies: 1, vectors: null, candidates: 3}",
        "tracking=[]",
        "--output",
        tmp_path / "run",
    )
    assert outcome.status == 0, outcome.err[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["metric"] == {"sst2": "accuracy", "mrpc": "f1", "stsb": "pearson"}[name]


def test_the_config_of_general_distillation_runs_on_a_local_file(tmp_path: Path) -> None:
    draw = random.Random(0)
    file = write_rows(tmp_path / "corpus.jsonl", [{"title": "a", "text": _text(draw)} for _ in range(200)])
    overrides = ["general.corpus.path=json", "general.corpus.name=null", f"general.corpus.data_files={file}"]
    steps = ["general.training.max_steps=2", "general.training.batch_size=8", "general.max_length=32"]
    outcome = run_cli(
        ROOT / "configs" / "general_wikipedia.yaml",
        *overrides,
        *steps,
        *SMALL,
        "tracking=[]",
        "--output",
        tmp_path / "run",
    )
    assert outcome.status == 0, outcome.err[-3000:]
    student = AutoModel.from_pretrained(tmp_path / "run" / "student")
    assert (student.config.num_hidden_layers, student.config.hidden_size) == (2, 24)
    # What it leaves is the beginning of a task's student.
    begin = (f"student.initialization={tmp_path / 'run' / 'student'}", "general=null", "evaluate.undistilled=false")
    succeed(TINY, *FEW_STEPS, *begin, "augment=null", "--output", tmp_path / "task")


def _multi(draw: random.Random, index: int) -> dict[str, object]:
    return {"text": _text(draw), "label": [index % 3] if index % 4 else [0, 2]}


def _tokens(draw: random.Random, index: int) -> dict[str, object]:
    words = _text(draw).split()
    return {"tokens": words, "tags": ["B-MUS" if word in ("song", "piano") else "O" for word in words]}


def _question(draw: random.Random, index: int) -> dict[str, object]:
    context = _text(draw)
    answer = draw.choice(context.split())
    start = context.index(answer)
    return {
        "id": str(index),
        "question": f"talk {answer}",
        "context": context,
        "answers": {"text": [answer], "answer_start": [start]},
    }


@pytest.mark.parametrize(
    ("task", "make"),
    [
        ("multi_label_classification", _multi),
        ("token_classification", _tokens),
        ("question_answering", _question),
    ],
)
def test_every_task_type_runs_to_the_end(task: str, make: object, tmp_path: Path) -> None:
    outcome = run_cli(
        TINY,
        *_splits(tmp_path, make),
        f"task.type={task}",
        *SMALL,
        *PHASES,
        "general=null",
        "augment.copies=1",
        "--output",
        tmp_path / "run",
    )
    assert outcome.status == 0, outcome.err[-3000:]
    assert "retention" in json.loads((tmp_path / "run" / "summary.json").read_text())
