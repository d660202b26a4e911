"""That our losses and gradients are those of the published TinyBERT code, on models and numbers stored here.
The comparison itself is benchmarks/reference.py's, which takes any folder of this form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.reference import Figure, compare, main
from distill.settings import UserError

FOLDERS = sorted(path.parent for path in (Path(__file__).parent / "reference").glob("*/expected.json"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a reference folder, to be spoilt."""
    return Path(shutil.copytree(FOLDERS[0], tmp_path / "reference"))


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "expected.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_losses_and_gradients_are_those_of_the_published_code(folder: Path) -> None:
    figures = {figure.name: figure for figure in compare(folder)}
    expected = json.loads((folder / "expected.json").read_text())
    pairs = sum(len(pairs) for pairs in expected["layer_map"].values())
    gradients = expected["gradient_norms_of_attention_plus_hidden"]
    assert len(figures) == pairs + len(("attention total", "hidden total", "t1", "t2")) + len(gradients)

    for figure in figures.values():
        tolerance = 1e-4 if figure.name.startswith("gradient ") else 1e-5
        assert figure.computed == pytest.approx(figure.expected, rel=tolerance), figure.name
    for name, norm in gradients.items():
        assert figures[f"gradient {name}"].expected == norm


def test_reference_command_prints_both_columns_and_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder) for folder in FOLDERS]) == 0
    out = capsys.readouterr().out
    assert "expected" in out
    assert "computed" in out
    assert "DIFFERS" not in out


@pytest.mark.parametrize("factor", [1 + 1e-4, float("nan")])
def test_reference_command_exits_1_on_a_difference(
    folder: Path, factor: float, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = json.loads((folder / "expected.json").read_text())
    rewrite(folder, hidden=[expected["hidden"][0] * factor, *expected["hidden"][1:]])
    assert main([str(folder)]) == 1
    assert capsys.readouterr().out.count("DIFFERS") == 1


def test_reference_command_exits_2_on_an_unusable_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "nothing"), str(folder)]) == 2
    captured = capsys.readouterr()
    assert "nothing cannot be used" in captured.err
    assert "hidden total" in captured.out, "the usable folder is still compared"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_map": {"attention": [[1, 9]], "hidden": [[0, 0]]}}, r"\[1, 9\]; layers count from 1 to 2"),
        ({"layer_map": {"attention": [[1, 2]], "hidden": [[0, 2]]}}, "embeddings .* only go with embeddings"),
        ({"layer_map": {}}, "'attention' is missing"),
        ({"attention": [1.0]}, "does not fit"),
        ({"input_ids": [[500]]}, "does not fit"),
        ({"gradient_norms_of_attention_plus_hidden": {"bert.nothing": 1.0}}, "no parameter bert.nothing"),
    ],
)
def test_reference_says_what_is_wrong_with_a_folder(folder: Path, changes: dict[str, Any], message: str) -> None:
    rewrite(folder, **changes)
    with pytest.raises(UserError, match=message):
        compare(folder)


def test_reference_needs_whole_checkpoints(folder: Path) -> None:
    (folder / "student" / "config.json").unlink()
    with pytest.raises(UserError, match="student is no checkpoint folder"):
        compare(folder)


def test_reference_takes_other_models_and_shows_the_difference(folder: Path) -> None:
    """The figures do come from the folder's weights."""
    from safetensors.torch import load_file, save_file

    path = folder / "projection.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}, path)
    wrong = {figure.name.split()[0] for figure in compare(folder) if not figure.agrees}
    assert wrong == {"hidden", "gradient"}


def test_a_figure_agrees_within_its_relative_tolerance() -> None:
    assert Figure("a", 2.0, 2.0 + 1.9e-5, 1e-5).agrees
    assert not Figure("a", 2.0, 2.0 + 2.1e-5, 1e-5).agrees
    assert Figure("a", 0.0, 0.0, 1e-5).agrees
