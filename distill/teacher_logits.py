"""The teacher's logits of encoded rows, computed once and kept on disk, for trainings that compare nothing else.
Which training that is, is left to the task stage; running a model over rows to evaluation.py."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset, Features, List, Value, concatenate_datasets, load_from_disk
from transformers import PreTrainedModel

from distill.checkpoint import write_folder
from distill.data import Collator, fingerprint
from distill.evaluation import predict

COLUMN = "teacher_logits"
BLOCK = 4_096
"""Rows of a file; an interrupted computation goes on behind the last whole one, and this many are held in memory."""


def teacher_logits(
    teacher: PreTrainedModel,
    features: Dataset,
    collator: Collator,
    accelerator: Accelerator,
    *,
    folder: Path,
    batch_size: int,
    progress: Callable[[int], object] = lambda rows: None,
) -> Dataset:
    """One column, teacher_logits: the logits of each row, flat, (C,) of a sequence and (T C,) of tokens; memory-mapped.

    They lie under `folder` in a folder named after a hash of the rows' pieces and of the teacher's weights in their
    precision, so that other rows or another teacher are never taken for these; runs may share `folder`.

    Args:
        teacher: in eval mode: with dropout a row has no one answer.
        folder: seen by every process.
        batch_size: rows a forward; in bf16 it shows in the last digit.
        progress: told how many rows were done.
    """
    place = folder / content_hash(teacher, features)
    blocks = []
    for start in range(0, len(features), BLOCK):
        block = place / f"rows-{start:010d}"
        rows = min(BLOCK, len(features) - start)
        known = [block.is_dir()]
        if accelerator.num_processes > 1:
            broadcast_object_list(known)  # all of them take part in a prediction, or none
        if not known[0]:
            part = features.select(range(start, start + rows))
            logits = predict(teacher, part, collator, accelerator, batch_size)
            if accelerator.is_main_process:
                _write(block, Dataset.from_dict({COLUMN: [row.reshape(-1) for row in logits]}, FEATURES))
            accelerator.wait_for_everyone()
        progress(rows)
        blocks.append(load_from_disk(str(block)))
    return concatenate_datasets(blocks)


FEATURES = Features({COLUMN: List(Value("float32"))})


def _write(block: Path, dataset: Dataset) -> None:
    block.parent.mkdir(parents=True, exist_ok=True)
    write_folder(block, lambda temporary: dataset.save_to_disk(str(temporary)))


def content_hash(teacher: PreTrainedModel, features: Dataset) -> str:
    """Of the rows' pieces and of the teacher's weights in their precision."""
    pieces = features.select_columns([name for name in ("input_ids", "token_type_ids") if name in features.features])
    digest = hashlib.sha256(fingerprint(pieces).encode())
    for name, tensor in sorted(teacher.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
