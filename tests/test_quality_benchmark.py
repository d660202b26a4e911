"""Claims about the quality benchmark: its rows are disjoint, what is measured is kept and not measured again, means and
retention are right, and the report says what is missing."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import quality, quality_report
from benchmarks.quality_systems import SYSTEMS, System, recipe
from benchmarks.quality_tasks import SIZES, TASKS, write_splits
from distill import tiny
from distill.presets import under_preset
from tests.quality_data import small_data


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return small_data(tmp_path, monkeypatch)


def test_held_out_rows_are_in_no_other_split(data: Path, tmp_path: Path) -> None:
    write_splits(TASKS["trec"], data, tmp_path / "rows")
    rows = {
        split: (tmp_path / "rows" / f"{split}.jsonl").read_text().splitlines()
        for split in ("train", "validation", "test")
    }
    source = tiny.load()
    assert len(rows["validation"]) == 48
    assert sorted(json.loads(row)["sentence"] for row in rows["train"] + rows["validation"]) == sorted(
        source["train"]["text"]
    )
    assert [json.loads(row)["sentence"] for row in rows["test"]] == source["test"]["text"][:]
    assert json.loads(rows["train"][0]).keys() == {"sentence", "label"}


def test_it_measures_each_system_once_and_goes_on_from_what_there_is(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "quality.json"
    given = ["--data", str(data), "--work", str(tmp_path / "work"), "--output", str(output), "--seconds", "0.2"]
    only = ["--only", "trec,teacher,undistilled,default,0"]
    assert quality.main([*given, *only]) == 0, capsys.readouterr().err
    found = json.loads(output.read_text())
    assert {(run["system"], run["size"]) for run in found["runs"]} == {
        ("teacher", "teacher"),
        *((system, size) for system in ("undistilled", "default") for size in ("3L-312", "tiny")),
    }
    by = {(row["system"], row["student"]): row for row in found["rows"]}
    assert by["default", "tiny"]["parameters"] == by["default", "3L-312"]["parameters"] - 24 * 12
    assert by["default", "3L-312"]["retention"] == pytest.approx(
        by["default", "3L-312"]["mean"] / by["teacher", "teacher"]["mean"]
    )
    assert not list((tmp_path / "work" / "runs").iterdir())

    def never(*arguments: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(quality, "measure", never)
    monkeypatch.setattr(quality, "measure_teacher", never)
    assert quality.main([*given, *only]) == 0
    assert "not run" not in capsys.readouterr().out
    with pytest.raises(AssertionError, match="measured again"):
        quality.main([*given, "--only", "trec,paper,0"])


@pytest.mark.parametrize("kind", ["classes", "numbers", "tokens"])
def test_the_peer_is_trained_on_the_same_rows_for_the_same_time(
    kind: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("textbrewer")  # the extra `bench`, which make setup leaves out
    if kind == "numbers":
        monkeypatch.setitem(TASKS, "trec", replace(TASKS["trec"], type="regression", metric="pearson"))
    if kind == "tokens":
        columns = {"text": "tokens", "label": "ner_tags"}
        task = replace(TASKS["trec"], columns=columns, type="token_classification", metric="f1")
        monkeypatch.setitem(TASKS, "trec", task)
        for split in ("train", "test"):
            rows = [{"tokens": ["rain", "often"], "ner_tags": ["B-W", "O"]}, {"tokens": ["talk"], "ner_tags": ["O"]}]
            with gzip.open(data / "trec" / f"{split}.jsonl.gz", "wt") as stream:
                stream.write("\n".join(json.dumps(row) for row in rows * 48) + "\n")
    output = tmp_path / "quality.json"
    given = ["--data", str(data), "--work", str(tmp_path / "work"), "--output", str(output), "--seconds", "1"]
    assert quality.main([*given, "--only", "trec,textbrewer,textbrewer-cut,0"]) == 0, capsys.readouterr().err
    runs = json.loads(output.read_text())["runs"]
    assert [run["system"] for run in runs] == ["textbrewer", "textbrewer-cut"]
    assert {run["size"] for run in runs} == {"3L-312"}
    for run in runs:
        assert 0.3 < run["training_seconds"] < 3
        assert min(run["steps"].values()) > 0


def run(task: str, system: str, size: str, seed: int, value: float, teacher: float = 0.9) -> dict[str, object]:
    budget = None if system == "teacher" else 60.0
    return {
        "task": task,
        "system": system,
        "size": size,
        "seed": seed,
        "budget_seconds": budget,
        "recipe": recipe(system, size),
        "value": value,
        **({} if system == "teacher" else {"teacher": teacher}),
        "metric": "accuracy",
        "training_seconds": 55.0,
        "parameters": 1_000_000,
    }


def test_rows_are_means_over_seeds_and_runs_of_others_stay(tmp_path: Path) -> None:
    file = tmp_path / "quality.json"
    for one in (
        run("trec", "teacher", "teacher", 42, 0.9),
        *(run("trec", "default", "tiny", seed, value) for seed, value in ((0, 0.1), (0, 0.80), (1, 0.84), (2, 0.85))),
    ):
        quality.add_run(file, one)
    found = json.loads(file.read_text())
    (row,) = [row for row in found["rows"] if row["system"] == "default"]
    assert row["seeds"] == 3
    assert row["mean"] == pytest.approx(0.83)
    # sqrt((0.03^2 + 0.01^2 + 0.02^2) / 2)
    assert row["deviation"] == pytest.approx(0.0264575, rel=1e-4)
    assert row["retention"] == pytest.approx(0.83 / 0.9)


def test_retention_is_of_the_teacher_that_taught(tmp_path: Path) -> None:
    """Runs of two machines have two teachers."""
    file = tmp_path / "quality.json"
    for seed, value, teacher in ((0, 0.72, 0.9), (1, 0.9, 1.0)):
        quality.add_run(file, run("trec", "default", "tiny", seed, value, teacher))
    (row,) = json.loads(file.read_text())["rows"]
    assert row["retention"] == pytest.approx((0.8 + 0.9) / 2)


def test_the_report_replaces_its_section_alone_and_names_what_was_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality_report, "DOCS", tmp_path)
    file = tmp_path / "quality.json"
    for one in (
        run("trec", "teacher", "teacher", 42, 0.9),
        run("mrpc", "teacher", "teacher", 42, 0.8),
        run("trec", "default", "tiny", 0, 0.81),
    ):
        quality.add_run(file, one)
    page = tmp_path / "results.md"
    page.write_text(f"before\n{quality_report.BEGIN}\nold\n{quality_report.END}\nafter\n")
    for _ in range(2):
        assert quality.main(["--report", "--output", str(file)]) == 0
        text = page.read_text()
        assert text.startswith("before\n")
        assert text.endswith("after\n")
        assert "old" not in text
    assert "| tiny, default | 1.00 M | 0.8100 (1 seed) | not run | 90.0% of 1 tasks |" in text
    assert "nothing was run: sst2, stsb, bbc_news, agnews, wnut17" in text
    assert "3L-312 textbrewer" in text
    assert "(quality.svg)" in text
    assert "<svg" in (tmp_path / "quality.svg").read_text()


def test_the_report_says_where_the_default_is_clearly_ahead() -> None:
    """By hand: on trec by 0.10 with deviations of 0.02 and 0.01, on mrpc by 0.01 with 0.01 each, on stsb behind."""
    values = {
        "trec": ((0.88, 0.90, 0.92), (0.79, 0.80, 0.81)),
        "mrpc": ((0.80, 0.81, 0.82), (0.79, 0.80, 0.81)),
        "stsb": ((0.70,), (0.75,)),
    }
    runs = [
        run(task, system, "3L-312", seed, value)
        for task, both in values.items()
        for system, own in zip(("default", "undistilled"), both, strict=True)
        for seed, value in enumerate(own)
    ]
    text = "\n".join(quality_report.section(quality.summarise(runs)))
    assert (
        "- 3L-312: `default` is ahead of `undistilled` on 2 of 3 tasks, by more than two standard deviations (the "
        "larger of the two) on 1 of 2." in text
    )
    assert "`textbrewer` on" not in text


def test_a_system_with_a_budget_of_its_own_has_it_unless_another_is_asked_for() -> None:
    def budgets(seconds: float | None) -> set[tuple[str, float | None]]:
        cells = quality.grid(["wnut17", "trec"], ["default", "more-text"], ["3L-312"], [0], seconds)
        return {(cell["system"], cell["budget_seconds"]) for cell in cells if cell["system"] != "teacher"}

    assert budgets(None) == {("default", 120.0), ("more-text", 600.0), ("more-text", 1800.0)}
    assert budgets(7.0) == {("default", 7.0), ("more-text", 7.0)}


def test_budgets_of_a_systems_own_have_one_table_beside_the_comparison() -> None:
    """By hand: retention of 0.9 / 0.9 in 600 seconds and of 0.81 / 0.9 in 1,800; what wnut17 had in 600 is apart."""
    given = (("trec", "default", 60.0, 0.6), ("trec", "more-text", 600.0, 0.9), ("wnut17", "more-text", 600.0, 0.3))
    runs = [
        {**run(task, system, "3L-312", 0, value), "budget_seconds": budget}
        for task, system, budget, value in (*given, ("wnut17", "more-text", 1800.0, 0.81))
    ]
    runs[2]["recipe"] = "another"
    text = "\n".join(quality_report.section(quality.summarise(runs)))
    short, rest = text.split(
        "Training for longer, 600 seconds each on trec; 1800 seconds each on wnut17, on one thread:"
    )
    long, other = rest.split("Training of 600 seconds each")
    assert "Systems of which nothing was run: 3L-312 undistilled" in short
    assert "more-text" not in short
    assert "| 3L-312, more-text | 1.00 M | 0.9000 (1 seed) | 0.8100 (1 seed) | 95.0% of 2 tasks |" in long
    assert long.rstrip().endswith("Systems of which nothing was run: tiny more-text.")
    assert "| 3L-312, more-text | 1.00 M | 0.3000 (1 seed) | 33.3% of 1 tasks |" in other
    assert "no longer has" not in long
    assert "no longer has: 3L-312 more-text on wnut17." in other


def test_a_stamp_changes_with_what_is_used_and_not_with_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    system, before = SYSTEMS["more-text"], recipe("more-text", "tiny")
    assert isinstance(system, System)
    for changed, same in (({"seconds": {}}, True), ({"general_steps": 5}, False), ({"rates": {}}, False)):
        monkeypatch.setitem(SYSTEMS, "more-text", replace(system, **changed))
        assert (recipe("more-text", "tiny") == before) is same, changed
    monkeypatch.setitem(SYSTEMS, "more-text", system)
    monkeypatch.setitem(SIZES, "tiny", replace(SIZES["tiny"], heads=6))
    assert recipe("more-text", "tiny") != before


def test_the_default_measured_is_the_preset_but_for_its_length() -> None:
    system = SYSTEMS["default"]
    assert isinstance(system, System)
    task = under_preset({})["task"]
    epochs = task["logits"].pop("epochs")
    assert epochs > 0
    assert task == {"intermediate": None, **system.task, "logits": system.phases["logits"]}


def test_seeds_of_a_recipe_that_has_changed_are_told_and_make_way_for_the_first_of_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, system = tmp_path / "quality.json", SYSTEMS["default"]
    assert isinstance(system, System)
    for seed in (0, 1):
        quality.add_run(file, run("trec", "default", "tiny", seed, 0.8))
    monkeypatch.setitem(SYSTEMS, "default", replace(system, rates={"tiny": 0.5}))
    quality.add_run(file, run("trec", "undistilled", "tiny", 0, 0.7))
    rows = json.loads(file.read_text())["rows"]
    assert [(row["system"], row["seeds"], row["old_recipe"]) for row in rows] == [
        ("default", 2, True),
        ("undistilled", 1, False),
    ]
    assert "no longer has: tiny default on trec." in "\n".join(quality_report.section(rows))
    quality.add_run(file, run("trec", "default", "tiny", 1, 0.9))
    rows = json.loads(file.read_text())["rows"]
    assert [(row["system"], row["mean"], row["old_recipe"]) for row in rows] == [
        ("default", 0.9, False),
        ("undistilled", 0.7, False),
    ]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--data"),
        (["--data", "nowhere"], "--data"),
        (["--data", ".", "--only", "trek"], "'trek' is none of sst2, trec"),
        (["--report"], "holds no runs"),
    ],
)
def test_wrong_arguments_end_with_2(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quality.main([*arguments, "--output", str(tmp_path / "none.json")]) == 2
    assert told in capsys.readouterr().err


def test_the_tiny_student_is_a_seventh_and_a_half_of_the_teacher() -> None:
    """By hand: narrow embeddings, the matrix behind them, three layers, a head for six classes of ELECTRA's form; the
    teacher has 22.71 M."""
    size = SIZES["tiny"]
    d, inner = size.width, size.intermediate_size
    narrow, pieces = size.changes["embedding_width"], size.changes["vocabulary"]["size"]
    layer = 4 * (d * d + d) + 2 * d * inner + inner + d + 4 * d
    embeddings = (pieces + 512 + 2) * narrow + 2 * narrow + narrow * d + d
    parameters = embeddings + size.layers * layer + d * d + d + 6 * d + 6
    assert parameters <= 22_713_216 / 7.5
