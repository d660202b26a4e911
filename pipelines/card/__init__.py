"""The model card: README.md in the student's folder, in the hub's format.
What stands in it is left to the files beside this one, putting it on the hub to publish.py."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

from distill.checkpoint import write_text
from distill.config import Config
from pipelines.card.body import body
from pipelines.card.facts import Facts, read_facts
from pipelines.card.metadata import metadata

FILE = "README.md"


def card(facts: Facts) -> ModelCard:
    """The same facts make the same card, to the byte."""
    return ModelCard(f"---\n{metadata(facts).to_yaml()}\n---\n\n{body(facts)}")


def write_card(config: Config, folder: Path) -> Path | None:
    """Write the card of a run folder's student anew; its path, or None where there is no exported student.

    A card that says the same is left alone.
    """
    facts = read_facts(config, folder)
    if facts is None:
        return None
    path, content = folder / "student" / FILE, str(card(facts))
    if not path.is_file() or path.read_text(encoding="utf-8") != content:
        write_text(path, content)
    return path
