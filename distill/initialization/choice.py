"""What student.initialization names: which of the ways is taken, whether it can be, and on what text.
The ways themselves are left to copied.py, cut.py, head.py and students.load_body."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from distill.initialization.copied import check_copy, copy_layers
from distill.initialization.cut import check_cut, cut_student
from distill.initialization.head import adopt_head
from distill.layer_map import LayerMap
from distill.students import Student, StudentOptions, load_body
from distill.training import StepSource

BUILT_IN = ("random", "teacher", "layers")
"""What is made here; any other student.initialization is a checkpoint."""

SAMPLE_PIECES = 16_384
"""Places for word pieces, padding included, in the text that a student is cut on: many times the width of a hidden
state, whose second moment is estimated from them, and a minute of BERT-base on one core."""


def check_initialization(options: StudentOptions, teacher: PreTrainedConfig, student: PreTrainedConfig) -> None:
    """Refuse what cannot be done with these two models; a checkpoint is checked where it is read (load_body).

    Raises:
        UserError: `layers` between other shapes, `teacher` or `layers` between other families.
    """
    if options.initialization == "teacher":
        check_cut(teacher, student)
    elif options.initialization == "layers":
        check_copy(teacher, student)


def initialize(
    student: Student, how: str, teacher: PreTrainedModel, layer_map: LayerMap, sample: Iterable[Mapping[str, Tensor]]
) -> None:
    """Give a freshly built student the weights that `how` names, and projections to match.

    random: those it has. teacher: cut out of the teacher, on its device; see cut_student. layers: the teacher's
    layers, whole; see copy_layers. Anything else is a checkpoint of the student's shape: its encoder, and its
    projections where it has such as this student's beside it (general/student of a run folder has), through which the
    teacher's task head is then read.

    Args:
        student: moved to the teacher's device.
        teacher: float32, eval mode, on the sample's device.
        sample: see sample_batches; read for `teacher` alone.

    Raises:
        UserError: see check_initialization and load_body.
    """
    student.to(teacher.device)
    if how == "teacher":
        cut_student(student, teacher, layer_map, sample)
    elif how == "layers":
        copy_layers(student, teacher, layer_map)
    elif how != "random":
        load_body(student, how)
        if _load_projections(student, Path(how) / "projections.safetensors"):
            adopt_head(student, teacher)


def sample_batches(source: StepSource, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """The first batches of `source`, up to SAMPLE_PIECES places, on the device.

    With `source` placed as one process alone, every process reads the same text and cuts the same student; where their
    devices round differently, DDP's first broadcast settles it.
    """
    places = 0
    for micro_batches in source.steps(0, source.steps_per_epoch or SAMPLE_PIECES):
        for batch in micro_batches:
            yield {name: tensor.to(device) for name, tensor in batch.items()}
            places += batch["input_ids"].numel()
        if places >= SAMPLE_PIECES:
            return


def _load_projections(student: Student, file: Path) -> bool:
    """Whether the file is there and has such as the student's."""
    if not file.is_file():
        return False
    found, own = load_file(file), student.projections.state_dict()
    if {name: tensor.shape for name, tensor in found.items()} != {name: tensor.shape for name, tensor in own.items()}:
        return False
    student.projections.load_state_dict(found)
    return True
