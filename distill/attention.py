"""The attention function that lets queries, keys and values be seen while attention itself stays SDPA.
What is made of them is left to losses/.

transformers' `output_attentions=True` forces eager attention and returns probabilities; TinyBERT matches the scores
before the softmax. A function registered in `AttentionInterface` sees each layer's queries and keys as they enter
attention (after rotary embeddings where a family has them), and costs nothing where nothing is recorded.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from distill.settings import UserError

IMPLEMENTATION = "sdpa_shown"
"""The name under which the function is registered; never written to a saved config."""


@dataclass(frozen=True)
class AttentionInputs:
    """What enters one layer's attention: each (B, H, T, d); scores are query @ key' * scaling."""

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float

    def scores(self) -> Tensor:
        """Pre-softmax scores `Q K' * scaling`, unmasked, (B, H, T, T)."""
        return torch.matmul(self.query, self.key.transpose(-1, -2)) * self.scaling


@dataclass
class _Recorder:
    layers: Collection[int]
    calls: int = 0
    inputs: dict[int, AttentionInputs] = field(default_factory=dict)


_active: ContextVar[_Recorder | None] = ContextVar("active_attention_recorder", default=None)


@contextmanager
def record_attention(layers: Collection[int]) -> Iterator[dict[int, AttentionInputs]]:
    """Record the attention inputs of `layers` (from 1, in the order in which attention is called) in one forward.

    Counting calls rather than modules covers families whose layers share one module (ALBERT).
    """
    recorder = _Recorder(layers)
    token = _active.set(recorder if layers else None)
    try:
        yield recorder.inputs
    finally:
        _active.reset(token)
    missing = sorted(set(layers) - set(recorder.inputs))
    if missing:
        raise RuntimeError(f"attention layers {missing} were not seen: call show_attention(model) first")


def _shown_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    recorder = _active.get()
    if recorder is not None:
        recorder.calls += 1
        if recorder.calls in recorder.layers:
            scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else float(scaling)
            recorder.inputs[recorder.calls] = AttentionInputs(query, key, value, scale)
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.requires_grad:
        # SDPA's bf16 backward on a CPU takes 3 to 10 times float32's (torch 2.13, 16 to 128 pieces, no AMX).
        with torch.autocast("cpu", enabled=False):
            wide = (tensor.float() for tensor in (query, key, value))
            attended, _ = sdpa_attention_forward(module, *wide, attention_mask, scaling=scaling, **kwargs)
        return attended.to(query.dtype), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register(IMPLEMENTATION, _shown_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def show_attention(model: PreTrainedModel) -> None:
    """Switch `model` to the attention function that can be recorded; its outputs stay SDPA's, to the bit.

    Raises:
        UserError: the family does not use transformers' attention interface.
    """
    family = model.config.model_type
    if not getattr(model, "_supports_attention_backend", False):
        raise UserError(
            f"teacher.model: {family} does not use transformers' attention interface, so its attention scores cannot "
            "be seen. Set the attention loss to null (task.losses.attention=null, general.losses.attention=null)."
        )
    model.set_attn_implementation(IMPLEMENTATION)
