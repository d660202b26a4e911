"""Text without labels that task distillation trains on beside the training rows; the teacher says what it is.
Which rows must not be among it, and when it is read, is left to the pipeline.

Source: what distillation gains most from is a larger transfer set than the labelled rows (Turc et al. 2019, arXiv
1908.08962)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset
from pydantic import PositiveInt
from transformers import PreTrainedTokenizerBase

from distill.data import SourceOptions, load_source
from distill.rows import read_column
from distill.settings import UserError, settings
from distill.tasks import TaskType

KEY = "task.unlabelled"
TEXTS = {"text": "text", "tokens": "text", "question": "text", "text_pair": "text_pair", "context": "text_pair"}
"""Canonical column -> the setting that names the user's."""


@settings
class UnlabelledOptions(SourceOptions):
    path: str = "text"
    """A `datasets.load_dataset` builder (json, csv, parquet, text), or a hub name."""
    split: str = "train"
    """The source's split, for instance unsupervised; a file given alone is train."""
    text_pair: str | None = None
    """Column with the second text, where data has one; text_pair, or context for questions, where not given."""
    max_rows: PositiveInt | None = None
    """Use a random sample of so many rows."""


def load_unlabelled(
    options: UnlabelledOptions,
    task: TaskType,
    names: Sequence[str],
    like: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> Dataset:
    """Rows with the columns and types of `like`, the training split, their labels saying nothing (`TaskType.no_label`).
    Rows that lack a text are left out. Where words are classified a text may be a list of them, else it is cut into
    words as the tokenizer cuts it.

    Raises:
        UserError: an unreadable source, a missing column, a value that is no text, no row.
    """
    splits = {"train": options.split, "validation": None, "test": None}
    rows = load_source(options, splits, key=KEY, named_by=f"{KEY}.split")["train"]
    texts = {name: _column_of(name, options, rows.column_names) for name in like.column_names if name in TEXTS}
    for name, own in texts.items():
        if own not in rows.column_names:
            raise UserError(
                f"{KEY}.{TEXTS[name]}: there is no column {own!r}; the rows have {', '.join(rows.column_names)}. Set "
                "it to one of them."
            )
    (label,) = set(like.column_names) - set(texts)

    def canonical(batch: Any, indices: list[int]) -> dict[str, list[Any]]:
        found = {}
        for name, own in texts.items():
            read = _words_by(tokenizer) if name == "tokens" else _text
            found[name] = read_column(read, batch, own, f"{KEY}.{TEXTS[name]}", KEY, indices)
        whole = [values for values in zip(*found.values(), strict=True) if all(values)]
        kept: dict[str, list[Any]] = {name: [row[at] for row in whole] for at, name in enumerate(found)}
        return {**kept, label: [task.no_label(names, len(row[0])) for row in whole]}

    checked = rows.map(
        canonical,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        features=like.features,
        desc="check unlabelled",
    )
    if not len(checked):
        raise UserError(f"{KEY}: there is no text in it. Give it rows, or set {KEY}=null.")
    if options.max_rows is not None and options.max_rows < len(checked):
        checked = checked.shuffle(seed=seed).select(range(options.max_rows))
    return checked


def _column_of(name: str, options: UnlabelledOptions, available: Sequence[str]) -> str:
    """The one that is named; else the canonical one, or that of a plain text file."""
    named = options.text if TEXTS[name] == "text" else options.text_pair
    return named or (name if name in available else TEXTS[name])


def _text(value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    return value if value is not None and value.strip() else ""


def _words_by(tokenizer: PreTrainedTokenizerBase) -> Callable[[Any], list[str]]:
    splitter = getattr(getattr(tokenizer, "backend_tokenizer", None), "pre_tokenizer", None)

    def words(value: Any) -> list[str]:
        if isinstance(value, list) and all(isinstance(word, str) for word in value):
            return value
        text = _text(value)
        if splitter is None:
            return text.split()
        # Of the text itself: byte-level splitters write a blank as a letter.
        cut = (text[begin:end].strip() for _, (begin, end) in splitter.pre_tokenize_str(text))
        return [word for word in cut if word]

    return words
