"""A user's rows under this project's column names, each one checked.
What a column or a label means is left to tasks/, reading files to data.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset, Value

from distill.settings import UserError
from distill.tasks import Columns, Rows, TaskType, config_key


def check_forms(labels: Sequence[Any], task: TaskType, column: str, split: str) -> None:
    """What must hold of labels before their names can be found.

    Args:
        split: as messages name it, perhaps with its file.

    Raises:
        UserError: naming the split, the row (from 0) and the rule.
    """
    for index, value in enumerate(labels):
        _located(task.check_form, value, "data.label", column, split, index)


def canonical_rows(dataset: Dataset, task: TaskType, columns: Columns, names: Sequence[str], split: str) -> Dataset:
    """Rename and check: every text a string, every label within the names.

    Args:
        split: as messages name it, perhaps with its file.

    Raises:
        UserError: naming the split, the row (from 0) and the rule.
    """
    mapping = task.columns(columns, dataset.column_names)
    dataset = dataset.select_columns(list(dict.fromkeys(mapping.values())))
    label_column = "tags" if "tags" in mapping else "answers" if "answers" in mapping else "label"

    def check(rows: Rows, indices: list[int]) -> dict[str, list[Any]]:
        checked: dict[str, list[Any]] = {}
        for canonical, own in mapping.items():
            key = config_key(canonical)
            read: Callable[[Any], Any] = _read_text if canonical not in (label_column, "tokens") else _read_words
            if canonical == label_column:
                read = lambda value: value if task.is_withheld(value) else task.read_label(value, names)  # noqa: E731
            checked[canonical] = read_column(read, rows, own, key, split, indices)
        for index, words, tags in zip(indices, checked.get("tokens", []), checked.get("tags", []), strict=False):
            if len(words) != len(tags):
                raise UserError(
                    f"data.label: row {index} of {split} has {len(words)} tokens and {len(tags)} tags; every token "
                    "needs one tag. Correct or remove the row."
                )
        for index, context, answers in zip(
            indices, checked.get("context", []), checked.get("answers", []), strict=False
        ):
            for text, start in zip(answers["text"][:1], answers["answer_start"][:1], strict=True):
                if context[start : start + len(text)] != text:
                    raise UserError(
                        f"data.label: row {index} of {split}, column {mapping['answers']!r}: {text!r} does not stand "
                        f"at {start} of the context. Correct or remove the row."
                    )
        return checked

    checked = dataset.map(
        check, batched=True, with_indices=True, remove_columns=dataset.column_names, desc=f"check {split}"
    )
    # A column keeps the type it had: classes that were read as 0.0 and 1.0 would stay so.
    if task.has_names and str(getattr(checked.features[label_column], "dtype", "")).startswith("float"):
        checked = checked.cast_column(label_column, Value("int64"))
    return checked


def read_column(
    read: Callable[[Any], Any], rows: Any, column: str, key: str, split: str, indices: Sequence[int]
) -> list[Any]:
    """What `read` makes of a column's values in a batch of `Dataset.map`.

    Args:
        key: the setting that names the column.
        split: as messages name it, perhaps with its file.

    Raises:
        UserError: naming key, split, row (from 0) and what `read` had to say.
    """
    try:
        values = list(rows[column])
    except UnicodeDecodeError:
        for number, index in enumerate(indices):
            _located(lambda at: rows.pa_table[column][at].as_py(), number, key, column, split, index)
        raise
    return [_located(read, value, key, column, split, index) for value, index in zip(values, indices, strict=True)]


def _located(read: Callable[[Any], Any], value: Any, key: str, column: str, split: str, index: int) -> Any:
    try:
        return read(value)
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: row {index} of {split}, column {column!r}: {error}. Save the file as UTF-8.") from None
    except ValueError as error:
        raise UserError(
            f"{key}: row {index} of {split}, column {column!r}: {error}. Correct or remove the row."
        ) from None


def _read_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    if not value.strip():
        raise ValueError("the text is empty")
    return value


def _read_words(value: Any) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(word, str) for word in value):
        raise ValueError(f"{value!r} is not a list of words")
    return value
