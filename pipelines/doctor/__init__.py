"""Preflight: what is worth knowing of teacher, data and losses before a run, each finding with what to do about it.
Mistakes that stop a run are left to pipeline.prepare, the look of findings to display.py.

Everything is measured on samples, stated in the findings, and on every process alike; nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from pipelines.doctor.finding import Finding, Level
from pipelines.doctor.losses import check_losses
from pipelines.doctor.models import check_environment, check_layer_map, check_memory, check_tokenizer
from pipelines.doctor.preflight import Preflight
from pipelines.doctor.rows import check_labels, check_overlap, check_padding, check_truncation, check_unknown_pieces
from pipelines.doctor.teacher import check_label_order, check_teacher
from pipelines.pipeline import Due
from pipelines.run import Run

__all__ = ["Finding", "Level", "Preflight", "examine"]


Check = Callable[[Preflight], list[Finding]]
MODEL_CHECKS: tuple[Check, ...] = (check_environment, check_memory, check_layer_map, check_tokenizer)
"""For every run; check_losses, which takes longest, comes last of all."""
DATA_CHECKS: tuple[Check, ...] = (
    check_teacher,
    check_label_order,
    check_labels,
    check_overlap,
    check_truncation,
    check_unknown_pieces,
    check_padding,
)
"""For runs with a task."""


def examine(run: Run, due: Sequence[Due]) -> Iterator[Finding]:
    """Every check in turn, on all processes together."""
    preflight = Preflight(run, due)
    data_checks = DATA_CHECKS if run.config.task is not None else ()
    for check in (*MODEL_CHECKS, *data_checks, check_losses):
        run.session.interruption.raise_if_requested()
        yield from check(preflight)
