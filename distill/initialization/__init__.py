"""The first weights of a student: copied from its teacher, cut out of it, or read from a checkpoint."""

from distill.initialization.choice import BUILT_IN, check_initialization, initialize, sample_batches
from distill.initialization.copied import copy_layers
from distill.initialization.cut import cut_student
from distill.initialization.head import adopt_head

__all__ = [
    "BUILT_IN",
    "adopt_head",
    "check_initialization",
    "copy_layers",
    "cut_student",
    "initialize",
    "sample_batches",
]
