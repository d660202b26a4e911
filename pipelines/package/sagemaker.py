"""model.tar.gz for SageMaker's Hugging Face inference containers: student, artefact, code/inference.py."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from pipelines.package.sources import ANSWERING, distill_sources, pinned

ARCHIVE = "model.tar.gz"

REQUIREMENTS = """\
# Installed into the container when it starts. numpy, tokenizers and transformers are the container's own: its handler
# imports transformers, which refuses tokenizers of another version.
"""


def write_sagemaker(run: Path, artefact: Path, folder: Path) -> None:
    """Write `folder`/model.tar.gz, the same bytes for the same run and versions.

    config.json, model.safetensors, tokenizer files    the student, for transformers
    artefacts/<format>/                                what answers
    code/inference.py, requirements.txt, distill/      the handler, its packages, the files of this project it uses
    """
    content = _files(run / "student")
    content |= {f"artefacts/{artefact.name}/{name}": data for name, data in _files(artefact).items()}
    content |= {f"code/{name}": data for name, data in distill_sources(ANSWERING).items()}
    content["code/inference.py"] = files("pipelines.package").joinpath("inference.py").read_bytes()
    lines = "\n".join(pinned(("onnxruntime", "pydantic")))
    content["code/requirements.txt"] = f"{REQUIREMENTS}{lines}\n".encode()
    write_archive(folder / ARCHIVE, content)


def write_archive(file: Path, content: Mapping[str, bytes]) -> None:
    """A .tar.gz of these files, sorted, without times and owners."""
    with (
        file.open("wb") as raw,
        gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name in sorted(content):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content[name]), 0o644
            archive.addfile(entry, io.BytesIO(content[name]))


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
