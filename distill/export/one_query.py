"""Attention of a single query without keys and values, for graphs whose head reads the first piece alone.
How the other pieces' queries were taken out is left to passes.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir


def fold_keys_and_values(graph: ir.Graph) -> None:
    """Where attention has one query, multiply by the matrices of keys and values once instead of once a piece.

    For each head, with hidden states X (T, D), query q (d), key matrix K and value matrix V (D, d):

        scores = q (X K + k)' = (q K') X' + q k'      a number for all pieces, which the softmax does not see
        output = p (X V + v)  = (p X) V + v           the probabilities p sum up to 1

    Two products of (T, D) by (D, D) become two of (H, D) by (D, T) and two of a row by (D, D): the same function, for
    128 pieces and 312 wide a twentieth of the arithmetic.
    """
    for node in [node for node in graph if node.op_type == "Attention" and _has_one_query(node)]:
        keys, values = _linear(node.inputs[1]), _linear(node.inputs[2])
        if keys is not None and values is not None and keys[0] is values[0] and node.inputs[3] is not None:
            _replace(graph, node, keys[0], keys[1], values[1], values[2])


def _has_one_query(node: ir.Node) -> bool:
    query = node.inputs[0]
    alone = all(not output.uses() and not output.is_graph_output() for output in node.outputs[1:])
    heads = {node.attributes[name].as_int() for name in ("q_num_heads", "kv_num_heads")}
    return alone and len(heads) == 1 and query is not None and query.shape is not None and query.shape[1] == 1


def _linear(value: ir.Value | None) -> tuple[ir.Value, np.ndarray, ir.Value | None] | None:
    """x, W and b of a value x W + b, whose b may be missing; None where it is something else."""
    node, bias = value.producer() if value is not None else None, None
    if node is not None and node.op_type == "Add":
        given = [one for one in node.inputs if one is not None and one.producer() is not None]
        constants = [one for one in node.inputs if one is not None and ir.convenience.get_const_tensor(one) is not None]
        if len(given) != 1 or len(constants) != 1 or constants[0].shape is None or len(constants[0].shape) != 1:
            return None
        node, bias = given[0].producer(), constants[0]
    if node is None or node.op_type != "MatMul" or node.inputs[0] is None or node.inputs[1] is None:
        return None
    weight = ir.convenience.get_const_tensor(node.inputs[1])
    return None if weight is None or len(weight.shape) != 2 else (node.inputs[0], weight.numpy(), bias)


def _replace(
    graph: ir.Graph, node: ir.Node, hidden: ir.Value, keys: np.ndarray, values: np.ndarray, bias: ir.Value | None
) -> None:
    """Shapes: B rows, H heads of width d, T pieces, D wide. Heads stand first where each has a matrix of its own."""
    H, scale, name = node.attributes["q_num_heads"].as_int(), node.attributes["scale"].as_float(), node.outputs[0].name
    D, d = keys.shape[0], keys.shape[1] // H
    added: list[ir.Node] = []

    def constant(of: str, content: Any) -> ir.Value:
        value = ir.val(f"{name}_{of}", const_value=ir.tensor(np.ascontiguousarray(content)))
        graph.register_initializer(value)
        return value

    def apply(operator: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        added.append(ir.node(operator, list(inputs), attributes))
        return added[-1].outputs[0]

    swapped: Mapping[str, Any] = {"perm": [1, 0, 2]}
    query, mask = node.inputs[0], node.inputs[3]
    assert query is not None
    assert mask is not None
    key_heads = constant("keys", (keys * np.float32(scale)).reshape(D, H, d).transpose(1, 2, 0))  # (H, d, D)
    value_heads = constant("values", values.reshape(D, H, d).transpose(1, 0, 2))  # (H, D, d)
    apart = apply("Reshape", query, constant("apart", np.array([-1, H, d])))
    asked = apply("Transpose", apply("MatMul", apply("Transpose", apart, **swapped), key_heads), **swapped)  # (B, H, D)
    scores = apply("MatMul", asked, apply("Transpose", hidden, perm=[0, 2, 1]))  # (B, H, T)
    masked = apply("Add", scores, apply("Squeeze", mask, constant("axis", np.array([1]))))  # (B, 1, T)
    read = apply("MatMul", apply("Softmax", masked, axis=-1), hidden)  # (B, H, D)
    heads = apply("Transpose", apply("MatMul", apply("Transpose", read, **swapped), value_heads), **swapped)
    output = apply("Reshape", heads, constant("together", np.array([-1, 1, H * d])))
    if bias is not None:
        output = apply("Add", output, bias)
    output.shape, output.type = node.outputs[0].shape, node.outputs[0].type
    graph.insert_before(node, added)
    node.outputs[0].replace_all_uses_with(output)
