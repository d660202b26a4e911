"""Text without labels of the quality benchmark: what is taken of which set, and that it is written once."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from benchmarks.quality_texts import texts_file, write_texts
from distill.settings import UserError

NAMED = "The rain fell on the town of Bath\nfor every morning of that year."
UNNAMED = "The rain fell on the town for every morning of that year."
PARAGRAPH = f"{NAMED} {UNNAMED} Too short for a sentence."


def write(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True)
    with gzip.open(folder / name, "wt") as stream:
        stream.write(text)


def test_entities_are_a_line_for_each_text_and_written_once(tmp_path: Path) -> None:
    """Of paragraphs each sentence once, of books those that name somebody."""
    rows = {name: [{"sentence": f"{name}\n{at}"} for at in range(2)] for name in ("agnews", "goemotions", "sms_spam")}
    rows["snips"] = [{"sentence": "play it"}]
    rows["squad_slices"] = [{"context": PARAGRAPH}, {"context": PARAGRAPH}]
    for name, own in rows.items():
        with pytest.raises(UserError, match=name):
            write_texts("entities", tmp_path, tmp_path)
        write(tmp_path / name, "train.jsonl.gz", "".join(json.dumps(row) + "\n" for row in own))
    with pytest.raises(UserError, match="books"):
        write_texts("entities", tmp_path, tmp_path)
    write(tmp_path / "books", "train.00.txt.gz", f"{PARAGRAPH} {NAMED}")
    file = texts_file("entities", tmp_path)
    assert not file.exists()
    write_texts("entities", tmp_path, tmp_path)
    named = NAMED.replace("\n", " ")
    expected = [f"{name} {at}" for name in ("agnews", "goemotions", "sms_spam") for at in range(2)]
    assert file.read_text().splitlines() == [*expected, "play it", named, UNNAMED, named, named]

    write_texts("mixed", tmp_path, tmp_path)
    assert sorted(texts_file("mixed", tmp_path).read_text().splitlines()) == sorted([*expected, named, UNNAMED, named])

    file.write_text("kept\n")
    write_texts("entities", tmp_path, tmp_path)
    assert file.read_text() == "kept\n"
