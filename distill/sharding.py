"""Training in shards (FSDP): weights in training, gradients and AdamW's moments are cut over the processes.
The loop is left to training.py, files to checkpoint.py: both see the student whole."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from distill.activations import Activations, Needs
from distill.optimizer import build_optimizer
from distill.students import Student


class Shards(nn.Module):
    """A copy of a student, cut by torch's fully_shard, that trains in its place.

    The student stays whole on every process and is brought up to date by `gather`: what validates, measures gradients
    or saves sees a plain module, in which processes need not keep step. In bytes a parameter, a process holds 4 for the
    student and 16 / N for its part of weights, gradients and two moments; within a step 4 more for the weights gathered
    for it, and of whole gradients those of one layer and of what is in none (embeddings, heads). DDP holds 16, and 4
    for its buckets. Neither the frozen teacher nor activations are cut.

    Weights are gathered and gradients averaged in float32, under the student's autocast: the arithmetic is DDP's. Of a
    step in several parts each part's gradients are averaged, lest they add up whole; hence no `no_sync`.
    """

    def __init__(self, student: Student, accelerator: Accelerator) -> None:
        """All processes must call it together, and `gather`, `scatter` and the optimizer's state_dict."""
        super().__init__()
        # Gives it autocast and its place in the checkpoints; evaluation_mode leaves DDP away.
        accelerator.prepare_model(student, evaluation_mode=True)
        broadcast(student.state_dict())  # as DDP does: the first process's weights are everyone's
        self._whole = (student,)  # not as a module of this one
        self.cut = copy.deepcopy(student).train()
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        # Families whose layers are none of that class (MPNet, ALBERT) are cut as one: the same, with more gathered.
        layers = [module for module in self.cut.modules() if isinstance(module, GradientCheckpointingLayer)]
        for module in (*layers, self.cut):
            # Kept to the backward pass, which may reach a layer by its queries and keys without touching its output.
            fully_shard(module, mesh=mesh, reshard_after_forward=False)

    def forward(self, batch: Mapping[str, Tensor], needs: Needs) -> Activations:
        with warnings.catch_warnings():
            # Queries and keys are views; nothing changes them in place.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
            return cast(Activations, self.cut(batch, needs))

    def optimizer(self, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        """AdamW over the shards. It saves and loads whole moments, those of a run without shards: a checkpoint can be
        read by any number of processes, in shards or not."""
        optimizer = build_optimizer(self, learning_rate, weight_decay)
        optimizer.register_state_dict_post_hook(_gather_states)
        optimizer.register_load_state_dict_pre_hook(_scatter_states)
        return optimizer

    @torch.no_grad()
    def gather(self) -> None:
        """Give the student the weights that were trained."""
        for parameter, shard in self._pairs():
            parameter.copy_(shard.full_tensor())

    @torch.no_grad()
    def scatter(self) -> None:
        """Go on from the student's weights."""
        for parameter, shard in self._pairs():
            shard.copy_(_cut_like(shard, parameter))

    def _pairs(self) -> Iterator[tuple[Tensor, DTensor]]:
        """What trains, whole and cut."""
        for parameter, shard in zip(self._whole[0].parameters(), self.cut.parameters(), strict=True):
            if parameter.requires_grad:
                yield parameter, cast(DTensor, shard)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or what its shards make up; then all processes must call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _cut_like(shard: DTensor, tensor: Tensor) -> DTensor:
    """A tensor that every process has whole, cut as another one is; nothing is sent."""
    return distribute_tensor(tensor, shard.device_mesh, shard.placements, src_data_rank=None)


def _gather_states(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    # To the CPU one by one: the device need not hold all moments whole.
    states = {
        index: {name: whole(value).cpu() for name, value in state.items()} for index, state in saved["state"].items()
    }
    return {**saved, "state": states}


def _scatter_states(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    shards = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {
        # The count of steps is a number; every process has it.
        index: {name: _cut_like(shards[index], value) if value.ndim else value for name, value in state.items()}
        for index, state in saved["state"].items()
    }
    return {**saved, "state": states}
