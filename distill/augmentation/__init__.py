"""Word-replacement augmentation: what a caller needs of the files beside this one.
When it runs and what the pipeline does with it is left to pipelines/augment.py."""

from distill.augmentation.columns import TextColumns
from distill.augmentation.masked_lm import MaskedLM, find_masked_lm, load_masked_lm
from distill.augmentation.options import AugmentOptions
from distill.augmentation.replacement import Augmenter, augment, mark_replaced, row_keys
from distill.augmentation.shards import read_counts, shard_paths, write_shards

__all__ = [
    "AugmentOptions",
    "Augmenter",
    "MaskedLM",
    "TextColumns",
    "augment",
    "find_masked_lm",
    "load_masked_lm",
    "mark_replaced",
    "read_counts",
    "row_keys",
    "shard_paths",
    "write_shards",
]
