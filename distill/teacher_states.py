"""The teacher's hidden states, queries and keys of encoded rows, computed once and kept on disk, for trainings that
compare layers for several epochs; its logits too, where they are compared beside. Logits alone are left to
teacher_logits.py; whether it pays, to the task stage."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from distill.activations import Activations, Needs, capture
from distill.attention import AttentionInputs
from distill.checkpoint import write_tensors
from distill.data import Collator
from distill.teacher_logits import COLUMN as LOGITS
from distill.teacher_logits import FEATURES as LOGITS_FEATURES
from distill.teacher_logits import content_hash

COLUMN = "teacher_states"
_ENDS = "teacher_logits_ends"
FILE_BYTES = 256_000_000
"""Of a file, about: large enough that flushing it takes less time than computing it; two are held in memory. An
interrupted computation goes on behind the last whole one."""
BATCH_TOKENS = 4_096
"""Of a forward that fills a block, padding included."""


@dataclass(frozen=True)
class StateLayout:
    """What the columns of a token's states are: hidden states in the order of their layers, then queries, keys and,
    where `values`, values of each layer of attention, heads side by side."""

    hidden: Mapping[int, int]
    """Width by layer."""
    attention: Mapping[int, AttentionInputs]
    """A sample by layer, whose heads, scaling and window hold for all rows."""
    values: bool
    dtype: torch.dtype

    @property
    def widths(self) -> list[int]:
        shown = [part.shape[1] * part.shape[3] for inputs in self.attention.values() for part in self._parts(inputs)]
        return [*self.hidden.values(), *shown]

    @property
    def token_bytes(self) -> int:
        return sum(self.widths) * self.dtype.itemsize

    def pack(self, shown: Activations) -> Tensor:
        """(B, T, width) of a forward pass."""
        attention = [part for layer in self.attention for part in self._parts(shown.attention[layer])]
        return torch.cat(
            [*(shown.hidden[layer] for layer in self.hidden), *(part.transpose(1, 2).flatten(2) for part in attention)],
            dim=-1,
        )

    def unpack(self, states: Tensor) -> Activations:
        """What pack() was given. Values that are not kept are empty, so that no term can take others for them."""
        parts = iter(states.split(self.widths, dim=-1))
        hidden = {layer: next(parts) for layer in self.hidden}
        attention = {}
        for layer, sample in self.attention.items():
            own = [next(parts).unflatten(-1, part.shape[1::2]).transpose(1, 2) for part in self._parts(sample)]
            value = own[2] if self.values else states.new_empty(0)
            attention[layer] = AttentionInputs(own[0], own[1], value, sample.scaling, sample.window)
        return Activations(hidden, attention)

    def _parts(self, inputs: AttentionInputs) -> list[Tensor]:
        return [inputs.query, inputs.key, *([inputs.value] if self.values else [])]


class TeacherStates:
    """States of each row of a dataset, memory-mapped; made by teacher_states()."""

    def __init__(
        self, layout: StateLayout, lengths: np.ndarray, files: Sequence[Path], block: int, logits: bool
    ) -> None:
        self.layout, self.lengths, self.block = layout, lengths, block
        before = lengths.cumsum() - lengths
        self.starts = before - np.repeat(before[::block], block)[: len(lengths)]
        self.blocks: list[Tensor] = []
        rows: list[np.ndarray] = []
        for file in files:
            with safe_open(file, framework="pt") as opened:  # maps the file; rows are read when they are asked for
                self.blocks.append(opened.get_tensor(COLUMN))
                if logits:
                    flat, ends = (opened.get_tensor(name).numpy() for name in (LOGITS, _ENDS))
                    rows += np.split(flat, ends[:-1])
        self.logits = Dataset.from_dict({LOGITS: rows}, LOGITS_FEATURES) if logits else None
        """A column as teacher_logits() makes it; None where they were not asked for."""

    def padded(self, rows: Sequence[int], length: int) -> Tensor:
        """(B, length, width) of the rows numbered so; zeros behind a row's end."""
        states = torch.empty(len(rows), length, sum(self.layout.widths), dtype=self.layout.dtype)
        for place, row in zip(states, rows, strict=True):
            start, own = self.starts[row], self.lengths[row]
            place[:own] = self.blocks[row // self.block][start : start + own]
            place[own:] = 0
        return states

    def activations(self, batch: Mapping[str, Tensor]) -> Activations:
        """What the teacher would show of a batch that holds teacher_states, zeros where it is padded; with its logits
        where the batch holds them too."""
        return replace(self.layout.unpack(batch[COLUMN]), logits=batch.get(LOGITS))


def state_layout(teacher: PreTrainedModel, features: Dataset, collator: Collator, needs: Needs) -> StateLayout:
    """What the states of these rows are, found on the first of them."""
    shown = _show(teacher, collator(features[:1], [1.0]), needs)
    tensors = [*shown.hidden.values(), *(inputs.query for inputs in shown.attention.values())]
    return StateLayout(
        {layer: states.shape[-1] for layer, states in shown.hidden.items()},
        dict(sorted(shown.attention.items())),
        needs.values,
        torch.cat([tensor.flatten()[:1] for tensor in tensors]).dtype,
    )


def teacher_states(
    teacher: PreTrainedModel,
    features: Dataset,
    collator: Collator,
    accelerator: Accelerator,
    needs: Needs,
    layout: StateLayout,
    *,
    folder: Path,
    progress: Callable[[int], object] = lambda rows: None,
) -> TeacherStates:
    """Compute what is not there yet, each process its share of the blocks, and open all.

    They lie under `folder` in a folder named after a hash of the rows' pieces, of the teacher's weights in their
    precision and of `needs`, so that others are never taken for these; runs may share `folder`.

    Args:
        teacher: on the device, in eval mode: with dropout a row has no one answer.
        folder: seen by every process.
        progress: told how many rows were done, by any process or before.
    """
    lengths = np.asarray(features["length"][:], dtype=np.int64)
    block = _block_rows(layout, lengths)
    wanted = repr((sorted(needs.hidden), sorted(needs.attention), needs.values, block, *["logits"] * needs.logits))
    place = folder / f"states-{hashlib.sha256((content_hash(teacher, features) + wanted).encode()).hexdigest()[:32]}"
    starts = range(0, len(features), block)
    files = [place / f"rows-{start:010d}.safetensors" for start in starts]
    place.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(1) as writer:  # a block is written while the teacher reads the next one
        written: Future[None] | None = None
        for number, (start, file) in enumerate(zip(starts, files, strict=True)):
            if number % accelerator.num_processes == accelerator.process_index and not file.is_file():
                rows = features.select(range(start, min(start + block, len(features))))
                states = _states(teacher, rows, lengths[start : start + block], collator, needs, layout)
                if written is not None:
                    written.result()
                written = writer.submit(write_tensors, file, states)
            progress(min(block, len(features) - start))
        if written is not None:
            written.result()
    accelerator.wait_for_everyone()
    return TeacherStates(layout, lengths, files, block, needs.logits)


def _block_rows(layout: StateLayout, lengths: np.ndarray) -> int:
    """Rows of a file."""
    return max(1, int(FILE_BYTES / (layout.token_bytes * lengths.mean())))


def _states(
    teacher: PreTrainedModel,
    rows: Dataset,
    lengths: np.ndarray,
    collator: Collator,
    needs: Needs,
    layout: StateLayout,
) -> dict[str, Tensor]:
    """What a file holds, row behind row: states (tokens, width) and, where they are needed, the logits of each row,
    flat, and where each row's end. Rows of similar length go through the teacher together."""
    states = torch.empty(int(lengths.sum()), sum(layout.widths), dtype=layout.dtype)
    starts = lengths.cumsum() - lengths
    logits: dict[int, Tensor] = {}
    order = np.argsort(-lengths, kind="stable")
    while len(order):
        size = max(1, BATCH_TOKENS // int(collator.width(lengths[order[:1]])))
        taken, order = order[:size], order[size:]
        batch = collator(rows[taken.tolist()], [1.0] * len(taken))
        shown = _show(teacher, batch, needs)
        for row, of_row in zip(taken, layout.pack(shown).cpu(), strict=True):
            states[starts[row] : starts[row] + lengths[row]] = of_row[: lengths[row]]
        if shown.logits is not None:
            for row, of_row in zip(taken, shown.logits.float().cpu(), strict=True):
                logits[row] = (of_row[: lengths[row]] if of_row.ndim > 1 else of_row).flatten()
    if not needs.logits:
        return {COLUMN: states}
    rows_in_order = [logits[row] for row in range(len(lengths))]
    ends = torch.tensor([len(row) for row in rows_in_order]).cumsum(0)
    return {COLUMN: states, LOGITS: torch.cat(rows_in_order), _ENDS: ends}


def _show(teacher: PreTrainedModel, batch: Mapping[str, Tensor], needs: Needs) -> Activations:
    on_device = {name: tensor.to(teacher.device) for name, tensor in batch.items()}
    with torch.no_grad():
        return capture(teacher, on_device, needs)
