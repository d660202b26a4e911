"""Claims about a whole run: the contracted files, skipping, redoing, dry runs, every config and task type."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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
