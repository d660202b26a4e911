"""Claims about benchmarks/initialization.py on the toy: what it measures, and that it goes on where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from benchmarks.initialization import main
from distill import tiny
from tests.builders import write_rows

SHAPE = ("--layers", "2", "--width", "24", "--heads", "4", "--intermediate-size", "48", "--max-length", "32")
SHORT = ("--steps", "0", "2", "--intermediate-epochs", "0.4", "--logits-epochs", "0.1", "--precision", "fp32")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name the toy's rows and a teacher with a head of random weights."""
    folder = tmp_path_factory.mktemp("toy")
    for split, rows in tiny.load().items():
        write_rows(folder / f"{split}.jsonl", ({"sentence": row["text"], "label": row["label"]} for row in rows))
    AutoModelForSequenceClassification.from_pretrained(tiny.teacher_folder(), num_labels=2).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return ["--data", str(folder), "--teacher", str(folder), *SHAPE, *SHORT]


def test_every_way_is_measured_and_a_stopped_bench_goes_on(
    toy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.json"
    arguments = [*toy, "--seeds", "3", "--output", str(output)]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    result = json.loads(output.read_text(encoding="utf-8"))
    cells = {(cell["student"], cell["initialization"]): cell for cell in result["cells"]}
    assert list(cells) == [
        ("2L-24", "random"),
        ("2L-24", "teacher"),
        ("2L-32", "random"),
        ("2L-32", "layers"),
        ("2L-32", "teacher"),
    ]
    for (student, way), cell in cells.items():
        assert list(cell["loss"]) == ["0", "2"]
        assert way == "random" or cell["loss"]["0"] < cells[student, "random"]["loss"]["0"]
        assert f"| {student} | {way} | {cell['loss']['0']:.4f} | {cell['loss']['2']:.4f} |" in printed.out
    assert "cell 5 of 5: 2L-32, teacher, seed 3" in printed.err

    # Stopped before the third cell was written: it alone is made again, the same, whatever ran before it.
    lost = result["cells"].pop(2)
    output.write_text(json.dumps(result), encoding="utf-8")
    assert main(arguments) == 0
    assert capsys.readouterr().err.count("cell ") == 1
    again = json.loads(output.read_text(encoding="utf-8"))["cells"]
    assert again[:4] == result["cells"]
    assert {**again[4], "seconds": 0} == {**lost, "seconds": 0}

    # Other settings are another bench.
    assert main([*arguments, "--logits-epochs", "0.2"]) == 2
    assert "--output" in (message := capsys.readouterr().err)
    assert "was made with other logits" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--data", "nowhere"), r"--data: nowhere holds no train.jsonl.gz or train.jsonl"),
        (("--steps", "0", "400"), "--steps: 400, but the intermediate phase has"),
    ],
)
def test_a_mistake_is_named(
    toy: list[str], change: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*toy, *change, "--output", str(tmp_path / "out.json")]) == 2
    assert message in capsys.readouterr().err
