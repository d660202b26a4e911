"""`tinybert card`: settings of the card, the card anew, and the push.
What the card says and how it reaches the hub is left to the files beside this one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from distill.checkpoint import write_text
from distill.config import Config, dump_config, load_config
from distill.settings import UserError
from pipelines.card import write_card
from pipelines.card.facts import read_facts
from pipelines.card.publish import ARTEFACTS, publish
from pipelines.run import close_run, open_run


def make_card(folder: Path, overrides: Sequence[str], push: str | None, private: bool, artefacts: bool | None) -> str:
    """Write the card of a run and, where `push` names a repository, publish it with the student; says where it lies.

    Raises:
        UserError: settings of something else than the card, no exported student, no artefacts, or what `publish` says.
    """
    for override in overrides:
        if not override.startswith("card."):
            raise UserError(
                f"{override!r} is no setting of the card: they begin with card., for instance card.license=apache-2.0. "
                "Others belong to the run: give them to `tinybert run` or `tinybert export`."
            )
    if push is None and (private or artefacts is not None):
        raise UserError("--private and --artefacts say how to push. Add --push OWNER/NAME, or leave them out.")
    config = load_config(folder / "config.yaml", overrides)
    if artefacts is not None:
        config = replace(config, card=replace(config.card, artefacts=artefacts))
    facts = read_facts(config, folder)
    if facts is None:
        raise UserError(
            f"{folder}: its student was not exported yet, or by a version that wrote no card. Export it first: "
            f"tinybert export {folder}"
        )
    if push is not None and config.card.artefacts and not facts.artefacts:
        raise UserError(
            f"--artefacts: {folder / ARTEFACTS} is not there. Make them first: tinybert export {folder} --to onnx,int8"
        )
    run = open_run(replace(config, output=str(folder)))
    with run.lock:
        run.lock.take()
        if push is None:
            told = f"card: {_write(config, folder)}"
        else:

            def write(full_name: str) -> None:
                _write(replace(config, card=replace(config.card, name=full_name)), folder)

            name, address = publish(folder, push, private=private, artefacts=config.card.artefacts, write_card=write)
            told = f"pushed to {name}: {address}"
    close_run(run)
    return told


def _write(config: Config, folder: Path) -> Path | None:
    write_text(folder / "config.yaml", dump_config(config))
    return write_card(config, folder)
