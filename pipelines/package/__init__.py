"""`tinybert package`: a finished, exported run as what SageMaker or Kubernetes takes.
What is common to both is here: what is refused, and that a folder appears whole or not at all."""

from __future__ import annotations

import errno
from functools import partial
from pathlib import Path

from distill.checkpoint import write_folder
from distill.serving.artefact import check_artefact, find_artefact
from distill.settings import UserError
from pipelines.package.kubernetes import image_name, write_kubernetes
from pipelines.package.sagemaker import write_sagemaker

TARGETS = ("sagemaker", "kubernetes")


def make_package(run: Path, target: str, output: Path, artefact: str | None, image: str | None) -> None:
    """Fill `output`, which must not be there or be empty, with what `target` takes.

    Args:
        image: the name of Kubernetes' image, with its tag; None: of the model's bytes.

    Raises:
        UserError: the target or the image's name is not known as one, `output` holds something, the run has no
            whole artefact or student.
    """
    if target not in TARGETS:
        raise UserError(f"--for: {target!r} is none of {', '.join(TARGETS)}.")
    if image is not None and target != "kubernetes":
        raise UserError("--image: only a package for kubernetes has an image. Leave it out.")
    _require_room(output)
    folder = find_artefact(run, artefact)
    check_artefact(folder)
    student = run / "student"
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (student / name).is_file():
            raise UserError(f"{student / name} is missing. Write the student again: tinybert export {run}")
    if target == "sagemaker":
        write_folder(output.absolute(), partial(write_sagemaker, run, folder))
    else:
        write_folder(output.absolute(), partial(write_kubernetes, folder, image_name(folder, image)))


def _require_room(output: Path) -> None:
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UserError(f"--output: {output} is there and is no folder. Give a folder that is not there.")
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"--output: {output} is not empty, and nothing is written over. Give another folder.")
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise UserError(f"--output: {output} cannot be made: {error.strerror}. Give another folder.") from error
