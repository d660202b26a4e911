"""The rows of task.unlabelled that a run may train on. Reading them is left to distill/unlabelled.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from distill.settings import UserError
from distill.unlabelled import KEY, TEXTS, load_unlabelled

if TYPE_CHECKING:
    from pipelines.run import Run


def unlabelled_rows(run: Run) -> Dataset | None:
    """None where there are none. Rows that say what a validation or test row says are left out: the teacher's answers
    about them would be learnt by heart.

    Raises:
        UserError: see load_unlabelled; a loss on labels is on; all rows are left out.
    """
    options = run.task_options.unlabelled
    if options is None:
        return None
    if run.task_options.losses.labels is not None:
        raise UserError(
            f"{KEY}: task.losses.labels learns from labels, which these rows have not. Set task.losses.labels=null, or "
            f"{KEY}=null."
        )
    splits = run.data.splits
    texts = [name for name in splits["train"].column_names if name in TEXTS]
    with run.accelerator.main_process_first():
        rows = load_unlabelled(
            options, run.task, run.data.names, splits["train"], run.checkpoint.tokenizer, run.config.seed
        )
        held_out = {says(row, texts) for split in ("validation", "test") for row in splits[split].select_columns(texts)}
        rows = rows.filter(lambda row: says(row, texts) not in held_out, desc="without held-out rows")
    if not len(rows):
        raise UserError(
            f"{KEY}: each of its rows says what a validation or test row says, and those are not trained on. Give "
            f"other text, or set {KEY}=null."
        )
    return rows


def says(row: Mapping[str, Any], texts: Sequence[str]) -> tuple[str, ...]:
    """Case and white space do not count: words may be cut otherwise than the labelled ones are."""
    return tuple("".join("".join(row[name]).split()).casefold() for name in texts)
