"""Text without labels that benchmarks/quality.py's students may learn from beside their task's rows: of the training
splits of other sets and of books."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from distill.checkpoint import write_text
from distill.settings import UserError

SEED = 42
NAMED_SENTENCES = 40_000
"""Of books, out of some 67,000 in which a name stands."""
MIXED = {"agnews": 10_001, "goemotions": 34_000, "sms_spam": 4_476, "books": 20_000}
"""Texts taken of each set, whatever they are about."""


def texts_file(name: str, work: Path) -> Path:
    """Where a collection lies once it is written."""
    return work / "texts" / f"{name}.txt"


def write_texts(name: str, data: Path, work: Path) -> None:
    """A line for each text of the collection `name` of TEXTS, of what lies under `data`, unless it was written.

    Raises:
        UserError: a set is not under `data`.
    """
    file = texts_file(name, work)
    if not file.is_file():
        lines = [" ".join(text.split()) + "\n" for text in TEXTS[name](data)]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, "".join(lines))


def entities(data: Path) -> list[str]:
    """Some 130,000 texts, most of which name somebody or something: news, what users write and ask for, sentences of
    encyclopaedic paragraphs, and of books those with a capital inside."""
    texts = [text for name in ("agnews", "goemotions", "sms_spam", "snips") for text in _column(data, name, "sentence")]
    for paragraph in dict.fromkeys(_column(data, "squad_slices", "context")):
        texts += _sentences(paragraph)
    named = [text for text in _books(data) if re.search(r"(?<=[a-z,] )[A-Z][a-z]+", text)]
    return texts + random.Random(SEED).sample(named, min(NAMED_SENTENCES, len(named)))


def mixed(data: Path) -> list[str]:
    """Some 68,000 texts, which `entities` was found against."""
    shuffled, texts = random.Random(SEED), []
    for name, count in MIXED.items():
        found = _books(data, "train.00") if name == "books" else list(_column(data, name, "sentence"))
        texts += shuffled.sample(found, min(count, len(found)))
    return texts


TEXTS: Mapping[str, Callable[[Path], list[str]]] = {"entities": entities, "mixed": mixed}


def _column(data: Path, name: str, column: str) -> Iterator[str]:
    source = data / name / "train.jsonl.gz"
    if not source.is_file():
        raise UserError(f"--data: {source} is not there. Give the folder that holds {name}/.")
    with gzip.open(source, "rt", encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)[column]


def _books(data: Path, name: str = "train.*") -> list[str]:
    """The sentences of books, file by file."""
    files = sorted((data / "books").glob(f"{name}.txt.gz"))
    if not files:
        raise UserError(f"--data: {data / 'books'} holds no {name}.txt.gz. Give the folder that holds books/.")
    texts = []
    for file in files:
        with gzip.open(file, "rt", encoding="utf-8") as stream:
            texts += _sentences(stream.read())
    return texts


def _sentences(text: str) -> list[str]:
    found = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    return [sentence for sentence in found if 40 < len(sentence) < 300]
