"""What an exported graph has that its outputs do not need: reshapes that undo each other, pieces that no head reads;
and sums written so that ONNX Runtime leaves them alone. Making the graph is left to graph.py."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir


def drop_reshapes(graph: ir.Graph) -> None:
    """Remove pairs of reshapes that end in the shape they began with (heads apart, heads together)."""
    for node in graph:
        if node.op_type != "Reshape":
            continue
        first = _input(node, 0).producer()
        if first is not None and first.op_type == "Reshape" and _input(first, 0).shape == node.outputs[0].shape:
            node.outputs[0].replace_all_uses_with(_input(first, 0))
    for node in reversed(graph):
        if node.op_type == "Reshape" and _unread(node.outputs[0]):
            graph.remove(node, safe=True)  # an unread one would still count as a reader


def keep_sums_apart(graph: ir.Graph) -> None:
    """Write the sum before a LayerNorm as Sum, not Add.

    ONNX Runtime joins Add and LayerNormalization into one SkipLayerNormalization when it loads a graph, whose CPU code
    adds up a row number by number: 3 to 6 times slower than the two apart, a fifth of a small student's time.
    """
    for node in graph:
        if node.op_type == "Add" and [user.op_type for user in node.outputs[0].consumers()] == ["LayerNormalization"]:
            node.op_type = "Sum"


BY_PIECE = frozenset({"Add", "Sum", "Mul", "Gelu", "Tanh", "Erf", "Relu", "LayerNormalization", "MatMul"})
"""Operators that do to each piece (row of the last axis) the same, whatever the others are, when all other inputs are
constants of fewer axes or matrices to multiply by."""


def keep_first_piece(graph: ir.Graph) -> None:
    """Where a head reads the first piece alone, compute the others no further than their keys and values.

    Sequence heads take hidden[:, 0]. Everything before it that works piece by piece, back to the queries of the last
    layer, then need not know the other pieces: the last layer costs its keys and values and one row of the rest. With
    4 layers that is a fifth of the arithmetic, with 12 a fourteenth; the logits stay what they were.
    """
    for head in [node for node in graph if _takes_first_piece(node)]:
        cut = {head}
        for node in reversed(graph):
            value = node.outputs[0]
            read_by_piece = all(user in cut and index in _by_piece(user) for user, index in value.uses())
            if read_by_piece and not _unread(value) and not value.is_graph_output() and _by_piece(node):
                cut.add(node)
        slices: dict[ir.Value, ir.Value] = {}
        for node in [node for node in graph if node in cut]:
            for index, axis in _by_piece(node).items():
                given = _input(node, index)
                if given.producer() not in cut:
                    if given not in slices:
                        slices[given] = _first_piece(graph, node, given, axis)
                    node.replace_input_with(index, slices[given])
            if node is not head:
                node.outputs[0].shape = _one_piece(node.outputs[0], axis=1)


def _takes_first_piece(node: ir.Node) -> bool:
    if node.op_type != "Gather" or len(_input(node, 0).shape or ()) != 3:
        return False
    index = ir.convenience.get_const_tensor(_input(node, 1))
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    return axis == 1 and index is not None and index.size == 1 and int(index.numpy().item()) == 0


def _by_piece(node: ir.Node) -> Mapping[int, int]:
    """Inputs of which the node reads, for a piece of its output (B, T, D), that piece alone: index -> axis of pieces.

    None where unknown.
    """
    if _takes_first_piece(node):
        return {0: 1}
    if node.op_type == "Attention":
        return {0: 1, 3: 2}  # queries (B, T, D), mask (B, 1, T, T)
    if node.op_type not in BY_PIECE or len(node.outputs[0].shape or ()) != 3:
        return {}
    constant = [ir.convenience.get_const_tensor(value) is not None for value in node.inputs if value is not None]
    axes = [len(value.shape) if value is not None and value.shape is not None else -1 for value in node.inputs]
    if node.op_type == "MatMul":
        return {0: 1} if axes == [3, 2] and constant[1] else {}
    known = all(axis <= 1 if fixed else axis == 3 for axis, fixed in zip(axes, constant, strict=True))
    return {index: 1 for index, fixed in enumerate(constant) if not fixed} if known else {}


def _first_piece(graph: ir.Graph, before: ir.Node, value: ir.Value, axis: int) -> ir.Value:
    """A node that gives the first of `value` along an axis, put before another."""
    bounds = []
    for name, number in (("start", 0), ("end", 1), ("axis", axis)):
        initializer = ir.val(f"{value.name}_first_{name}", const_value=ir.tensor(np.array([number], dtype=np.int64)))
        graph.register_initializer(initializer)
        bounds.append(initializer)
    first = ir.Value(name=f"{value.name}_first", shape=_one_piece(value, axis), type=value.type)
    graph.insert_before(before, ir.Node("", "Slice", [value, *bounds], outputs=[first], name=f"{value.name}_first"))
    return first


def _one_piece(value: ir.Value, axis: int) -> ir.Shape | None:
    return None if value.shape is None else ir.Shape([*value.shape[:axis], 1, *value.shape[axis + 1 :]])


def _unread(value: ir.Value) -> bool:
    return not value.uses() and not value.is_graph_output()


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value
