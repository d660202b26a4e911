"""How queries, keys and values come to be seen while attention itself stays as it is.
What is made of them is left to losses/.

transformers' `output_attentions=True` forces eager attention and returns probabilities; TinyBERT matches the scores
before the softmax. A function registered in `AttentionInterface` sees each layer's queries and keys as they enter
attention (after rotary embeddings where a family has them), and costs nothing where nothing is recorded. Families that
do not call attention through that interface (DeBERTa-v2 and v3, MPNet) have a rule each: it names the projections whose
outputs are queries, keys and values; forward hooks read them, and are there only while something is recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import MODEL_MAPPING, AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "sdpa_shown"
"""The name under which the function is registered; never written to a saved config."""


@dataclass(frozen=True)
class AttentionInputs:
    """What enters one layer's attention: each (B, H, T, d); content scores are query @ key' * scaling.

    Rotary embeddings are in the queries and keys. Terms of relative position that a family adds to the scores are not
    in them: DeBERTa's content to position and position to content, MPNet's bias by distance. A student without such
    terms then learns what is said of content alone, and where things are from its own positions. DeBERTa's scaling is
    that of its sum, 1 / sqrt(d (1 + number of position terms)) (arXiv 2006.03654, eq. 4).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    window: int | None = None
    """A query attends to keys at most so many positions away (ModernBERT's local layers); None: to all."""

    def scores(self) -> Tensor:
        """Pre-softmax scores `Q K' * scaling`, (B, H, T, T); neither padding nor the window is masked in them."""
        return torch.matmul(self.query, self.key.transpose(-1, -2)) * self.scaling

    def visible(self) -> Tensor | None:
        """Which keys the window lets each query attend to, (T, T) bool; None where that is all of them."""
        length = self.query.shape[-2]
        if self.window is None or self.window >= length - 1:
            return None
        places = torch.arange(length, device=self.query.device)
        return (places[:, None] - places).abs() <= self.window


@dataclass
class _Recorder:
    layers: Collection[int]
    calls: int = 0
    inputs: dict[int, AttentionInputs] = field(default_factory=dict)


_active: ContextVar[_Recorder | None] = ContextVar("active_attention_recorder", default=None)


@contextmanager
def record_attention(model: PreTrainedModel, layers: Collection[int]) -> Iterator[dict[int, AttentionInputs]]:
    """Record the attention inputs of `layers` of `model` (from 1) in one forward pass.

    Where the interface shows them, layers are counted by calls of attention and not by modules, since layers may share
    one module (ALBERT).

    Raises:
        ValueError: the attention of such a model cannot be seen (see `why_unseen`).
        RuntimeError: a layer was not seen in the forward pass.
    """
    if layers and (reason := why_unseen(model.config)) is not None:
        raise ValueError(f"attention cannot be recorded: {reason}")
    recorder = _Recorder(layers)
    token = _active.set(recorder if layers else None)
    hooks = _hook(model, recorder)
    try:
        yield recorder.inputs
    finally:
        _active.reset(token)
        for hook in hooks:
            hook.remove()
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
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    recorder = _active.get()
    if recorder is not None:
        recorder.calls += 1
        if recorder.calls in recorder.layers:
            scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else float(scaling)
            # The interface's number is one more than the largest distance, as flash attention takes it.
            window = None if sliding_window is None else sliding_window - 1
            recorder.inputs[recorder.calls] = AttentionInputs(query, key, value, scale, window)
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.requires_grad:
        # SDPA's bf16 backward on a CPU takes 3 to 10 times float32's (torch 2.13, 16 to 128 pieces, no AMX).
        with torch.autocast("cpu", enabled=False):
            wide = (tensor.float() for tensor in (query, key, value))
            attended, _ = sdpa_attention_forward(module, *wide, attention_mask, scaling=scaling, **kwargs)
        return attended.to(query.dtype), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register(IMPLEMENTATION, _shown_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


@dataclass(frozen=True)
class _Rule:
    """Where the attention of an encoder layer is, and its projections to queries, keys and values."""

    attention: str
    query: str
    key: str
    value: str


_RULES = {
    "mpnet": _Rule("attention.attn", "q", "k", "v"),
    "deberta-v2": _Rule("attention.self", "query_proj", "key_proj", "value_proj"),
}


def _hook(model: PreTrainedModel, recorder: _Recorder) -> list[RemovableHandle]:
    """Hooks on the recorded layers of a family that has a rule; none for any other."""
    rule = _RULES.get(model.config.model_type)
    if rule is None:
        return []
    parts = {"query": rule.query, "key": rule.key, "value": rule.value}
    handles: list[RemovableHandle] = []
    for number in recorder.layers:
        attention = attrgetter(rule.attention)(model.base_model.encoder.layer[number - 1])
        keep = _keeper(attention, number, recorder)
        handles += [getattr(attention, name).register_forward_hook(keep(part)) for part, name in parts.items()]
    return handles


def _keeper(attention: Any, number: int, recorder: _Recorder) -> Callable[[str], Callable[..., None]]:
    """Makes the hooks of one layer: each keeps what its projection gives, the last one records the layer."""
    projected: dict[str, Tensor] = {}

    def keep(part: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if part in projected:  # DeBERTa-v3 also projects its table of positions so, after the content
                return
            projected[part] = output.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
            if len(projected) == 3:
                query, key, value = (projected[each] for each in ("query", "key", "value"))
                terms = sum(kind in getattr(attention, "pos_att_type", ()) for kind in ("c2p", "p2c"))
                scaling = 1 / math.sqrt(query.shape[-1] * (1 + terms))
                recorder.inputs[number] = AttentionInputs(query, key, value, scaling)

        return hook

    return keep


def show_attention(model: PreTrainedModel) -> None:
    """Prepare `model` so that its attention can be recorded; its outputs stay SDPA's, to the bit.

    Only where bf16 is trained on a CPU are they a float32 SDPA's, rounded. A model whose attention cannot be seen stays
    as it is: it can still teach hidden states and logits.
    """
    if _uses_interface(type(model)):
        model.set_attn_implementation(IMPLEMENTATION)


def why_unseen(config: PreTrainedConfig) -> str | None:
    """Why the attention of models with this config cannot be recorded; None where it can."""
    family = config.model_type
    if family not in _RULES and not _uses_interface(MODEL_MAPPING.get(type(config), None)):
        return f"{family} does not call its attention through transformers' attention interface"
    if getattr(config, "inner_group_num", 1) != 1:  # ALBERT
        return f"{family} with inner_group_num={config.inner_group_num} attends several times a layer"
    return None


def _uses_interface(model_class: Any) -> bool:
    return bool(getattr(model_class, "_supports_attention_backend", False))
