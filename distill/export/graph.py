"""A model as an ONNX graph: attention as one node, batch and length dynamic, the last layer cut to what is read.
Running a graph is left to runtime.py, int8 to quantization.py."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from distill.activations import model_inputs

ONE_NODE = "onnx_one_node"
"""The name under which attention as one node is registered; never written to a saved config."""

FAMILIES_IN_ONE_NODE = frozenset(
    {"bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie", "distilbert", "albert"}
)
"""Families whose attention is a softmax of scaled products over all pieces that are no padding, and nothing else."""

MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""


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
    if model.config.model_type in FAMILIES_IN_ONE_NODE:
        model.set_attn_implementation(ONE_NODE)
    try:
        with warnings.catch_warnings(), _quiet("torch.onnx"):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                head.eval(),
                kwargs=inputs,
                dynamo=True,
                dynamic_shapes=dict.fromkeys(inputs, dynamic),
                input_names=list(inputs),
                output_names=outputs,
                verbose=False,
            )
    finally:
        model.set_attn_implementation(before)
    assert program is not None
    drop_reshapes(program.model.graph)
    keep_first_piece(program.model.graph)
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
    """com.microsoft.MultiHeadAttention: softmax(query key' * scaling) value over pieces that attention_mask (B, T) has."""
    B, H, T, d = query.shape
    attended = torch.onnx.ops.symbolic(
        f"{MICROSOFT}::MultiHeadAttention",
        [*(heads.transpose(1, 2).flatten(2) for heads in (query, key, value)), None, attention_mask.to(torch.int32)],
        {"num_heads": H, "scale": float(d**-0.5 if scaling is None else scaling)},
        dtype=query.dtype,
        shape=(B, T, H * d),
        version=1,
    )
    return attended.unflatten(2, (H, d)), None


def _padding(*_: Any, attention_mask: Tensor, **__: Any) -> Tensor:
    """What is padding, as it was given; the node makes scores of it."""
    return attention_mask


AttentionInterface.register(ONE_NODE, _attention)
AttentionMaskInterface.register(ONE_NODE, _padding)


def drop_reshapes(graph: ir.Graph) -> None:
    """Remove pairs of reshapes that end in the shape they began with (heads apart, heads together)."""
    for node in graph:
        if node.op_type != "Reshape":
            continue
        first = node.inputs[0].producer()
        if first is not None and first.op_type == "Reshape" and first.inputs[0].shape == node.outputs[0].shape:
            node.outputs[0].replace_all_uses_with(first.inputs[0])


BY_PIECE = frozenset({"Add", "Mul", "Gelu", "Tanh", "Erf", "Relu", "LayerNormalization", "MatMul"})
"""Operators that do to each piece (row of the last axis) the same, whatever the others are, when all other inputs are
constants of fewer axes or matrices to multiply by."""


def keep_first_piece(graph: ir.Graph) -> None:
    """Where a head reads the first piece alone, compute the others no further than their keys and values.

    Sequence heads take hidden[:, 0]. Everything before it that works piece by piece, back to the queries of the last
    layer, then need not know the other pieces: the last layer costs its keys and values and one row of the rest. With
    4 layers that is a fifth of the arithmetic, with 12 a fourteenth; the logits stay what they were.
    """
    for head in [node for node in graph if _takes_first_piece(node)]:
        cut: set[ir.Node] = {head}
        for node in reversed(graph):
            uses = node.outputs[0].uses()
            if uses and all(user in cut and index in _by_piece(user) for user, index in uses) and _by_piece(node):
                cut.add(node)
        slices: dict[ir.Value, ir.Value] = {}
        for node in [node for node in graph if node in cut]:
            for index in _by_piece(node):
                given = node.inputs[index]
                if given.producer() not in cut:
                    if given not in slices:
                        slices[given] = _first_piece(graph, node, given)
                    node.replace_input_with(index, slices[given])
            if node is not head:
                B, _, D = node.outputs[0].shape
                node.outputs[0].shape = ir.Shape([B, 1, D])


def _takes_first_piece(node: ir.Node) -> bool:
    if node.op_type != "Gather" or len(node.inputs[0].shape or ()) != 3:
        return False
    index = ir.convenience.get_const_tensor(node.inputs[1])
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    return axis == 1 and index is not None and index.size == 1 and int(index.numpy().item()) == 0


def _by_piece(node: ir.Node) -> list[int]:
    """The inputs (B, T, D) of which the node reads, for a piece of its output, that piece alone; none where unknown."""
    if _takes_first_piece(node) or (node.op_type == "MultiHeadAttention" and node.domain == MICROSOFT):
        return [0]
    if node.op_type not in BY_PIECE or len(node.outputs[0].shape or ()) != 3:
        return []
    constant = [ir.convenience.get_const_tensor(value) is not None for value in node.inputs if value is not None]
    axes = [len(value.shape) if value is not None and value.shape is not None else -1 for value in node.inputs]
    if node.op_type == "MatMul":
        return [0] if axes == [3, 2] and constant[1] else []
    known = all(axis <= 1 if fixed else axis == 3 for axis, fixed in zip(axes, constant, strict=True))
    return [index for index, fixed in enumerate(constant) if not fixed] if known else []


def _first_piece(graph: ir.Graph, before: ir.Node, value: ir.Value) -> ir.Value:
    """A node that gives value[:, :1], put before another."""
    bounds = []
    for name, number in (("start", 0), ("end", 1), ("axis", 1)):
        initializer = ir.val(f"{value.name}_first_{name}", const_value=ir.tensor(np.array([number], dtype=np.int64)))
        graph.register_initializer(initializer)
        bounds.append(initializer)
    B, _, D = value.shape or (None, None, None)
    first = ir.Value(name=f"{value.name}_first", shape=ir.Shape([B, 1, D]), type=value.type)
    graph.insert_before(before, ir.Node("", "Slice", [value, *bounds], outputs=[first], name=f"{value.name}_first"))
    return first
