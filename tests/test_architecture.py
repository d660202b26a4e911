"""That imports go one way, and that two libraries have one door each; read from the syntax, nothing is imported.
import-linter checks the same by following import chains (see pyproject.toml); neither knows of the other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ORDER = ("distill", "pipelines", "scripts", "benchmarks", "tests")
"""The project's own packages; a file imports from its own and from those to its left."""

DOORS = {"evaluate": "distill/evaluation.py", "wandb": "distill/tracking.py"}
"""A library, and the only file that may import it."""


def imported_modules(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of each module that the source imports at whatever depth: in functions, in strings, for types."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, name.name) for name in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield node.lineno, module
            case ast.Call(func=function, args=[ast.Constant(value=str(module)), *_]):
                if ast.unparse(function).split(".")[-1] in {"__import__", "import_module", "importorskip"}:
                    yield node.lineno, module


def violations(path: str, source: str) -> list[str]:
    """What in the source breaks a rule, given the file's path below the root."""
    found = []
    rank = ORDER.index(path.split("/")[0])
    for line, module in imported_modules(source):
        library = module.split(".")[0]
        if library in ORDER and ORDER.index(library) > rank:
            found.append(f"{path}:{line} imports {module}, which lies above {ORDER[rank]}")
        if path != DOORS.get(library, path):
            found.append(f"{path}:{line} imports {library}; only {DOORS[library]} may")
    return found


def test_imports_go_one_way_and_libraries_have_one_door() -> None:
    files = [file for package in ORDER for file in (ROOT / package).rglob("*.py")]
    paths = {file.relative_to(ROOT).as_posix(): file for file in files}
    assert {"distill/objective.py", "pipelines/pipeline.py", "scripts/distill.py", *DOORS.values()} <= paths.keys()

    found = [one for path, file in sorted(paths.items()) for one in violations(path, file.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("distill/objective.py", "import pipelines.stage"),
        ("distill/export/onnx.py", "from pipelines import stage"),
        ("distill/data.py", "def load():\n    from pipelines.stage import Stage"),
        ("distill/data.py", "if TYPE_CHECKING:\n    from scripts.distill import main"),
        ("distill/data.py", "importlib.import_module('pipelines.stage')"),
        ("pipelines/cli.py", "import benchmarks.speed"),
        ("scripts/distill.py", "from tests import conftest"),
        ("distill/training.py", "import evaluate as metrics"),
        ("pipelines/evaluate.py", "from evaluate import load"),
        ("pipelines/tracking.py", "import wandb"),
        ("distill/evaluation.py", "import os, wandb.sdk"),
    ],
)
def test_a_forbidden_import_is_found(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("distill/objective.py", "from distill.settings import settings"),
        ("distill/evaluation.py", "import evaluate"),
        ("distill/tracking.py", "import wandb"),
        ("pipelines/cli.py", "from pipelines.evaluate import evaluate\nfrom distill.evaluation import score"),
        ("pipelines/cli.py", "find_spec('wandb')"),
        ("scripts/distill.py", "from pipelines.cli import main"),
        ("benchmarks/speed.py", "from pipelines.cli import main"),
        ("tests/test_cli.py", "import pipelines.cli"),
    ],
)
def test_an_allowed_import_is_left_alone(path: str, source: str) -> None:
    assert violations(path, source) == []
