"""The rows of task.unlabelled that a run may train on. Reading them is left to distill/unlabelled.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from datasets import Dataset

from distill.augmentation import TextColumns, row_keys
from distill.settings import UserError
from distill.unlabelled import KEY, load_unlabelled

if TYPE_CHECKING:
    from pipelines.run import Run


def unlabelled_rows(run: Run) -> Dataset | None:
    """None where there are none. Rows that say what a validation or test row says are left out: the teacher's answers
    about them would be learnt by heart.

    Raises:
        UserError: see load_unlabelled; a loss on labels is on.
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
    columns = TextColumns.of(splits["train"].column_names)
    with run.accelerator.main_process_first():
        rows = load_unlabelled(
            options, run.task, run.data.names, splits["train"], run.checkpoint.tokenizer, run.config.seed
        )
        held_out = row_keys(splits["validation"], columns) | row_keys(splits["test"], columns)
        return rows.filter(lambda row: not row_keys([row], columns) & held_out, desc="without held-out rows")
