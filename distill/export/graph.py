"""A model as an ONNX graph: attention as one node, batch and length dynamic.
What is taken out of it is left to passes.py and one_query.py, running it to runtime.py, int8 to quantization.py."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from distill.activations import model_inputs
from distill.export.one_query import fold_keys_and_values
from distill.export.passes import drop_reshapes, keep_first_piece, keep_sums_apart

ONE_NODE = "onnx_one_node"
"""The name under which attention as one node is registered; never written to a saved config."""

ATTENTION_OPSET = 23
"""The first with Attention; of its RotaryEmbedding, as torch writes it, ONNX Runtime 1.32 takes one row alone."""

OPSET = 20
"""The first with Gelu; for families that are exported as torch takes them apart."""

FAMILIES_IN_ONE_NODE = frozenset(
    {"bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie", "distilbert", "albert"}
)
"""Families whose attention is a softmax of scaled products over all pieces that are no padding, and nothing else."""


def export_graph(model: PreTrainedModel, batch: Mapping[str, Tensor], file: Path) -> None:
    """Write `model` to `file` as ONNX; inputs are (batch, length), both dynamic.

    Outputs are what the task head calls them: logits, or start_logits and end_logits. Attention is one node of ONNX
    Runtime where the family allows it: its own search for fusable patterns does not know the graphs that torch.export
    gives, and what is never taken apart need not be found. LayerNorm and GELU are nodes of ONNX, which the runtime
    joins with their neighbours when it loads the graph.

    Args:
        model: float32, on the CPU.
        batch: an encoded batch of two rows or more: which inputs there are is taken from it.
    """
    inputs = model_inputs(model, batch)
    dynamic = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    head = _Head(model)
    outputs = head.outputs(inputs)
    before = model.config._attn_implementation
    in_one_node = model.config.model_type in FAMILIES_IN_ONE_NODE
    if in_one_node:
        model.set_attn_implementation(ONE_NODE)
    try:
        with warnings.catch_warnings(), _quiet("torch.onnx"):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                head.eval(),
                kwargs=inputs,
                dynamo=True,
                opset_version=ATTENTION_OPSET if in_one_node else OPSET,
                dynamic_shapes=dict.fromkeys(inputs, dynamic),
                input_names=list(inputs),
                output_names=outputs,
                verbose=False,
            )
    finally:
        model.set_attn_implementation(before)
    assert program is not None
    for simplify in (drop_reshapes, keep_first_piece, fold_keys_and_values, keep_sums_apart):
        simplify(program.model.graph)
    RemoveUnusedNodesPass()(program.model)
    ClearMetadataAndDocStringPass()(program.model)
    ir.save(program.model, file)


class _Head(nn.Module):
    """The logits of a task head alone, as a tuple."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **types)
        return tuple(output[name] for name in output if name.endswith("logits"))

    def outputs(self, inputs: Mapping[str, Tensor]) -> list[str]:
        with torch.inference_mode():
            return [name for name in self.model(**inputs) if name.endswith("logits")]


class _quiet:  # noqa: N801  (a context manager)
    """Loggers under a name say errors alone; the exporter's tell of packages that nothing here needs."""

    def __init__(self, name: str) -> None:
        self.logger = logging.getLogger(name)

    def __enter__(self) -> None:
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self.logger.setLevel(self.level)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """ONNX's Attention: softmax(query key' * scaling + mask) value, heads side by side in the last axis."""
    H, d = query.shape[1], query.shape[3]
    Q, K, V = (heads.transpose(1, 2).flatten(2) for heads in (query, key, value))
    attended, *_states = torch.onnx.ops.attention(
        Q,
        K,
        V,
        attention_mask,
        q_num_heads=H,
        kv_num_heads=H,
        scale=float(d**-0.5 if scaling is None else scaling),
    )
    return attended.unflatten(2, (H, d)), None


def _padding(*_: Any, attention_mask: Tensor, **__: Any) -> Tensor:
    """Scores to add, (B, 1, T, T): 0 for pieces, the lowest number for padding."""
    B, T = attention_mask.shape
    lowest = torch.finfo(torch.float32).min
    return (attention_mask == 0).to(torch.float32).mul(lowest)[:, None, None].expand(B, 1, T, T)


AttentionInterface.register(ONE_NODE, _attention)
AttentionMaskInterface.register(ONE_NODE, _padding)
