"""Claims about the preflight as a command: it writes nothing, ends with the contracted status, and examines every task
type, on one process or two.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines import doctor
from pipelines.doctor import Level
from tests.builders import FEW_STEPS, ROOT, TINY, contents, finished_run, run_cli, run_tinybert, succeed
from tests.doctor_cases import (
    Row,
    other_tokenizer,
    preflight,
    save_encoder,
    save_teacher,
    several,
    splits,
    tagged,
    two_classes,
    words,
)


def test_the_doctor_writes_nothing_and_ends_with_0(tmp_path: Path) -> None:
    outcome = run_tinybert("doctor", TINY, *FEW_STEPS, "--output", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    assert "task.intermediate" in outcome.out, "the plan comes first"
    assert "ok      layer map" in outcome.out
    assert outcome.out.splitlines()[-1].startswith("0 errors, ")
    assert list(tmp_path.iterdir()) == []


def test_the_doctor_leaves_a_finished_run_as_it_is() -> None:
    before = {name: seen for name, seen in contents(finished_run()).items() if not name.startswith("wandb/")}
    outcome = run_tinybert("doctor", finished_run() / "config.yaml", "tracking=[]", "--output", finished_run())
    assert outcome.status in (0, 2), outcome.err  # its teacher had eight steps
    assert "teacher" in outcome.out
    assert {n: seen for n, seen in contents(finished_run()).items() if not n.startswith("wandb/")} == before


def test_a_finding_that_is_an_error_ends_with_2(tmp_path: Path) -> None:
    start = save_encoder(tmp_path / "student", other_tokenizer())
    arguments = (TINY, *FEW_STEPS, start, "general=null", "--output", tmp_path / "run")
    for outcome in (run_tinybert("doctor", *arguments), run_cli(*arguments, "--dry-run")):
        assert outcome.status == 2
        assert "error   tokenizer" in outcome.out
        assert "-> Give a checkpoint with the student's tokenizer" in outcome.out
        assert outcome.out.splitlines()[-1].startswith("1 error, ")
        assert outcome.err == ""
    assert not (tmp_path / "run").exists()


def test_a_mistake_found_before_the_checks_is_told_as_ever(tmp_path: Path) -> None:
    outcome = run_tinybert("doctor", TINY, "runtime.precision=fp32", "student.layers=9", "--output", tmp_path / "run")
    assert outcome.status == 2
    assert outcome.err.startswith("error: ")
    assert "layer map" not in outcome.out


def test_general_distillation_alone_is_checked_without_task_data(tmp_path: Path) -> None:
    outcome = succeed(TINY, *FEW_STEPS[:1], "task=null", "augment=null", "--output", tmp_path / "run", "--dry-run")
    assert "losses general" in outcome.out
    assert "truncation" not in outcome.out


def ask_first(index: int) -> Row:
    context = words(index)
    answer = context.split()[0]
    return {"question": "rain", "context": context, "answers": {"text": [answer], "answer_start": [0]}}


@pytest.mark.parametrize(
    ("task", "make", "labels"),
    [
        ("single_label_classification", two_classes, 2),
        ("multi_label_classification", several, 3),
        ("regression", lambda index: {"text": words(index), "label": index / 7}, 1),
        ("token_classification", tagged, 3),
        ("question_answering", ask_first, 2),
    ],
)
def test_every_task_type_is_examined_to_the_end(
    task: str, make: Callable[[int], Row], labels: int, tmp_path: Path
) -> None:
    teacher = save_teacher(tmp_path / "teacher", task, num_labels=labels)
    looked_at = preflight(
        tmp_path,
        *splits(tmp_path, make),
        f"task.type={task}",
        f"teacher.model={teacher}",
        "teacher.training=null",
        "task.losses.labels.weight=0.5",
    )
    findings = list(doctor.examine(looked_at.run, looked_at.due))
    subjects = {finding.subject for finding in findings}
    assert {"teacher", "labels", "overlap", "truncation", "unknown", "padding", "losses task.logits"} <= subjects
    assert ("label order" in subjects) is looked_at.run.task.has_names
    assert all(finding.remedy for finding in findings if finding.level is not Level.OK)


def test_two_processes_examine_together_and_one_speaks(tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher")
    program = str(ROOT / "scripts" / "distill.py")
    arguments = [TINY, *FEW_STEPS, f"teacher.model={teacher}", "teacher.training=null", "augment=null"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", "2"]
    outcome = subprocess.run(
        [*launch, program, *arguments, "--output", str(tmp_path / "run"), "--dry-run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "2 process(es)" in outcome.stdout, outcome.stderr[-3000:]
    assert outcome.stdout.count("label order") == 1
    assert outcome.stdout.count("losses task.logits") == 1
    assert outcome.stdout.splitlines()[-1].count("error") == 1
    assert not (tmp_path / "run").exists()
