"""Finding an artefact and making sure that it is whole, before a server starts with it."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

from distill.export.session import METADATA_FILE, MODEL_FILE
from distill.serving.answers import OUTPUTS, Answerer, Served, read_json
from distill.serving.server import Model
from distill.settings import UserError

PREFERRED = ("int8", "onnx")


def find_artefact(path: Path, name: str | None) -> Path:
    """The folder of an artefact: `path` itself, or the one of that name in a run folder; int8 where both are there.

    Raises:
        UserError: there is none.
    """
    if name is None and (path / METADATA_FILE).is_file():
        return path
    for tried in PREFERRED if name is None else (name,):
        folder = path / "artefacts" / tried
        if (folder / METADATA_FILE).is_file():
            return folder
    raise UserError(
        f"{path}: there is no artefact{f' {name}' if name else ''} to serve. Make one: tinybert export {path} --to "
        f"{name or 'onnx,int8'}"
    )


def student_model(folder: Path, threads: int) -> Model:
    """What an artefact's folder holds, as a model to serve under the name `student`.

    Raises:
        UserError: a file is missing, or is not the one that was exported.
    """
    served, kind = check_artefact(folder)
    size = (folder / MODEL_FILE).stat().st_size / 1e6
    title = f"{kind}, {size:.1f} MB"
    return Model("student", served, partial(Answerer.of_artefact, folder, threads), title)


def check_artefact(folder: Path) -> tuple[Served, str]:
    """(what it answers, its format). Raises UserError where a file is missing or is not the one that was exported."""
    again = "Export it again: tinybert export RUN --to onnx,int8"
    try:
        metadata = read_json(folder / METADATA_FILE)
        served, kind, files = Served.of(metadata), str(metadata["format"]), dict(metadata["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / METADATA_FILE} cannot be read as an artefact's metadata. {again}") from error
    if served.task not in OUTPUTS:
        raise UserError(f"{folder / METADATA_FILE}: task {served.task!r} is none that is served: {', '.join(OUTPUTS)}.")
    for name in (MODEL_FILE, "tokenizer.json", "config.json"):
        file = folder / name
        if not file.is_file() or name not in files:
            raise UserError(f"{file} is missing. {again}")
        with file.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != files[name]["sha256"]:
                raise UserError(f"{file} is not the file that was exported: its SHA-256 differs. {again}")
    return served, kind
