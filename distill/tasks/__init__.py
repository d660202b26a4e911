"""One class per task type: its columns, its labels, its head, its encoding and what a prediction is.
Loading files is left to data.py, checking their rows to rows.py, the figures to evaluation.py.

Whatever a user's file calls its columns, a `Dataset` of this project has the canonical ones:
    sentences   text, text_pair (optional), label
    tokens      tokens, tags
    questions   question, context, answers {text: [...], answer_start: [...]}
Encoded, every row (every window of a context, for questions) has input_ids, token_type_ids where the tokenizer makes
them, labels, length, and row, the number of the canonical row it came from; tokens also have words, the number of the
word that each labelled piece begins, and windows starts and ends, where each piece of the context stands in it.
"""

from distill.tasks.questions import QuestionAnswering
from distill.tasks.task_type import Columns, Rows, TaskType, config_key
from distill.tasks.texts import MultiLabel, Regression, SingleLabel
from distill.tasks.tokens import TokenClassification

__all__ = ["TASKS", "Columns", "Rows", "TaskType", "config_key"]

TASKS: dict[str, TaskType] = {
    task.name: task() for task in (SingleLabel, MultiLabel, Regression, TokenClassification, QuestionAnswering)
}
