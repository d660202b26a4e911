"""What builds an image of the server and runs it in Kubernetes: Dockerfile, its context, manifests.
The server is distill/serving/'s."""

from __future__ import annotations

import platform
import re
import shutil
from importlib.resources import files
from pathlib import Path
from string import Template

from distill.checkpoint import sha256_of
from distill.export.session import MODEL_FILE
from distill.serving.options import ServingOptions
from distill.settings import UserError
from pipelines.package.sources import ANSWERING, SERVING, distill_sources, pinned_with_dependencies

MANIFESTS = ("deployment.yaml", "service.yaml", "hpa.yaml", "pdb.yaml")
PACKAGES = ("litserve", "onnxruntime", "prometheus-client", "tokenizers", "numpy", "pydantic")
"""What the server imports."""
STOP_SECONDS, SPARE_SECONDS = 5, 10
"""Until a stopping pod is told to drain, so that no request is sent to it any more; what it has above draining."""
IMAGE = re.compile(r"[a-z0-9][a-z0-9._:/-]*:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


def image_name(artefact: Path, given: str | None) -> str:
    """The image's name with its tag, which is of the model's bytes where none is given. Raises UserError."""
    name = given or f"tinybert-student:{sha256_of(artefact / MODEL_FILE)[:12]}"
    if not IMAGE.fullmatch(name) or name.endswith(":latest"):
        raise UserError(f"--image: {name!r} is no name with a fixed tag, such as registry.example.com/bbc-news:1.")
    return name


def write_kubernetes(artefact: Path, image: str, folder: Path) -> None:
    """Fill `folder`, which is then the context of `docker build`.

    Dockerfile, .dockerignore  requirements.txt  model/ (the artefact)  distill/ (the server's sources)  manifests/
    """
    template = files("pipelines.package")
    drain = ServingOptions().drain_seconds
    values = {
        "image": image,
        "python": platform.python_version(),
        "port": "8080",
        "drain_seconds": str(drain),
        "stop_seconds": str(STOP_SECONDS),
        "grace_seconds": str(STOP_SECONDS + drain + SPARE_SECONDS),
    }
    for name in ("Dockerfile", *(f"manifests/{one}" for one in MANIFESTS)):
        text = template.joinpath(*name.split("/")).read_text(encoding="utf-8")
        _write(folder / name, Template(text).substitute(values).encode())
    _write(folder / ".dockerignore", b"manifests\n")
    _write(folder / "requirements.txt", "".join(f"{line}\n" for line in pinned_with_dependencies(PACKAGES)).encode())
    for name, data in distill_sources((*ANSWERING, *SERVING)).items():
        _write(folder / name, data)
    shutil.copytree(artefact, folder / "model")


def _write(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
