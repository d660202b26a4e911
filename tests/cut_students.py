"""A student as the tests of its first weights build it: of the teacher's shape where nothing else is said."""

from __future__ import annotations

from transformers import PreTrainedModel

from distill.students import Student, StudentOptions, build_student, student_config
from distill.tasks import TASKS, TaskType

CLASSES = TASKS["single_label_classification"]


def build(teacher: PreTrainedModel, task: TaskType = CLASSES, seed: int = 5, **changes: object) -> Student:
    """As deep, wide and many-headed as the teacher where nothing else is said."""
    shape = {"layers": 4, "width": 16, "heads": 2, "intermediate_size": 24, "dropout": 0}
    options = StudentOptions(**{**shape, **changes})
    return build_student(student_config(teacher.config, options), task, options, 16, seed).eval()
