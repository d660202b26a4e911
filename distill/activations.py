"""What a forward pass shows of a model: hidden states, queries, keys and values of chosen layers, logits.
How attention is made to show them is left to attention.py; what is compared is left to losses/."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.attention import AttentionInputs, record_attention


@dataclass(frozen=True)
class Needs:
    """What an objective asks of a model: hidden states (0 = embeddings), attention layers (from 1), logits.

    values: whether the attention layers' values are compared, not their queries and keys alone."""

    hidden: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()
    logits: bool = False
    values: bool = False

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            self.hidden | other.hidden,
            self.attention | other.attention,
            self.logits or other.logits,
            self.values or other.values,
        )


@dataclass(frozen=True)
class Activations:
    """hidden[i]: (B, T, D), i = 0 is the output of the embeddings. attention[m]: queries, keys and values of layer m,
    counted from 1. logits: (B, C) for sequences, (B, T, C) for tokens, (B, T, 2) for spans (start, end)."""

    hidden: Mapping[int, Tensor] = field(default_factory=dict)
    attention: Mapping[int, AttentionInputs] = field(default_factory=dict)
    logits: Tensor | None = None

    def at(self, positions: Tensor, ends: Tensor | None = None) -> Activations:
        """What was found at `positions` (B, U) of each row's T, in their order: U stands in the place of T.

        Args:
            ends: (B, U), where the logits are of spans: the positions at which these end.
        """
        rows = torch.arange(len(positions), device=positions.device)[:, None]

        def of_heads(values: Tensor) -> Tensor:  # (B, H, T, d); the indexed dimensions come first
            return values[rows, :, positions].transpose(1, 2)

        logits = self.logits
        if logits is not None and logits.dim() == 3:
            starts = logits[rows, positions]
            logits = starts if ends is None else torch.stack((starts[..., 0], logits[rows, ends][..., 1]), dim=-1)
        return Activations(
            {index: states[rows, positions] for index, states in self.hidden.items()},
            {
                layer: replace(seen, query=of_heads(seen.query), key=of_heads(seen.key), value=of_heads(seen.value))
                for layer, seen in self.attention.items()
            },
            logits,
        )


def model_inputs(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch `model` takes: input_ids, attention_mask, and token_type_ids where it tells types apart.

    The batch is made for teacher and student alike. DistilBERT, ModernBERT and MPNet do not take types, DeBERTa mostly
    has no embeddings of them, RoBERTa has one, the default.
    """
    names = ["input_ids", "attention_mask"]
    if getattr(model.config, "type_vocab_size", 0) > 1 and _takes_token_types(type(model).forward):
        names.append("token_type_ids")
    return {name: batch[name] for name in names if name in batch}


@cache
def _takes_token_types(forward: Callable[..., Any]) -> bool:
    return "token_type_ids" in inspect.signature(forward).parameters


def capture(model: PreTrainedModel, batch: Mapping[str, Tensor], needs: Needs) -> Activations:
    """Run `model` on `batch` and keep what `needs` names; nothing else is kept or computed for it.

    The task head does not run when the logits are not needed. Gradients flow unless the caller switched them off.

    Args:
        model: a model prepared by `attention.show_attention` when needs.attention is not empty.
        batch: input_ids, attention_mask and, where the tokenizer makes them, token_type_ids; each (B, T).

    Raises:
        ValueError: attention is needed and the model cannot show it; see `attention.why_unseen`.
    """
    body = model if needs.logits else model.base_model
    with record_attention(model, needs.attention) as attention:
        output = body(**model_inputs(body, batch), output_hidden_states=bool(needs.hidden), return_dict=True)
    hidden = {index: output.hidden_states[index] for index in sorted(needs.hidden)}
    return Activations(hidden, attention, read_logits(output) if needs.logits else None)


def read_logits(output: Mapping[str, Tensor]) -> Tensor:
    """The logits of any task head; a span head's start and end logits are stacked to (B, T, 2)."""
    if "start_logits" in output:
        return torch.stack((output["start_logits"], output["end_logits"]), dim=-1)
    return output["logits"]
