"""A float32 graph in 8 bits, in several ways, and the choice among them by what was measured.
Measuring is left to the callers.

Products are of 8-bit integers, their sums of 32-bit ones. A weight matrix is signed, with a scale for each output
channel; what is multiplied by it is unsigned (x86 has instructions for just this pair), with one scale and zero point
for the tensor: found anew for every tensor (dynamic), or read from calibration rows (static), which saves a pass over
each tensor and costs accuracy where a row's range is another. Word embeddings are stored signed, with a scale for each
word. Small tables, biases, LayerNorm, GELU, attention's own products and the layer that gives the logits stay float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import RemoveUnusedNodesPass

from distill.settings import UserError

MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

LARGE_TABLE_ROWS = 4096
"""Tables of fewer rows (positions, token types) are a hundredth of a model and cheaper to read in float32."""

SIMILAR = 0.03
"""Share of the fastest candidate's latency within which two are as fast as each other: timings repeat no better."""

Inputs = Mapping[str, np.ndarray]
Range = tuple[float, float]
"""Smallest and largest value."""


@dataclass(frozen=True)
class Layer:
    """A product with a constant matrix, and the bias that is added to it."""

    node: ir.Node
    weight: np.ndarray
    """(in, out)."""
    bias: ir.Value | None
    output: ir.Value
    """Of the product, or of the addition of the bias."""

    @property
    def input(self) -> ir.Value:
        value = self.node.inputs[0]
        assert value is not None
        return value


def _layers(graph: ir.Graph) -> Iterator[Layer]:
    """Every layer but one that gives an output of the graph."""
    for node in graph:
        if node.op_type not in ("MatMul", "Gemm") or len(node.inputs) < 2 or node.inputs[1] is None:
            continue
        weight = ir.convenience.get_const_tensor(node.inputs[1])
        if weight is None or len(weight.shape) != 2:
            continue
        matrix, bias, output = weight.numpy(), None, node.outputs[0]
        if node.op_type == "Gemm":
            matrix = matrix.T if node.attributes["transB"].as_int() else matrix
            bias = node.inputs[2] if len(node.inputs) > 2 else None
        elif len(users := list(output.consumers())) == 1 and users[0].op_type == "Add":
            others = [value for value in users[0].inputs if value is not output]
            if len(others) == 1 and others[0] is not None and _is_row(others[0], matrix.shape[1]):
                bias, output = others[0], users[0].outputs[0]
        if not output.is_graph_output():
            yield Layer(node, matrix, bias, output)


def _is_row(value: ir.Value, width: int) -> bool:
    constant = ir.convenience.get_const_tensor(value)
    return constant is not None and tuple(constant.shape) == (width,)


def ranges(graph: Path, rows: Iterable[Inputs]) -> dict[str, list[Range]]:
    """Smallest and largest value that each layer reads, for each of some rows given to a float32 graph."""
    model = ir.load(graph)
    read = list({layer.input.name: layer.input for layer in _layers(model.graph)}.values())
    model.graph.outputs.extend(value for value in read if not value.is_graph_output())
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [str(value.name) for value in read]
    found: dict[str, list[Range]] = {name: [] for name in names}
    for row in rows:
        for name, values in zip(names, session.run(names, row), strict=True):
            found[name].append((float(values.min()), float(values.max())))
    return found


def largest_range(found: Sequence[Range]) -> Range:
    """Nothing seen is cut off."""
    return min(low for low, _ in found), max(high for _, high in found)


def mean_range(found: Sequence[Range]) -> Range:
    """One odd row does not widen the steps for all others; its extremes are cut off."""
    low, high = np.mean(found, axis=0)
    return float(low), float(high)


RECIPES = {"dynamic": None, "static_largest": largest_range, "static_mean": mean_range}
"""Ways into 8 bits: how the ranges of calibration rows make the range of a tensor; None where they are not used."""


def quantize(graph: Path, recipe: str, calibration: Mapping[str, Sequence[Range]], file: Path) -> None:
    """Write `graph` in 8 bits to `file`.

    Args:
        recipe: a name of RECIPES.
        calibration: what ranges() found; only static recipes read it.
    """
    model = ir.load(graph)
    over_rows = RECIPES[recipe]
    fixed = {name: over_rows(found) for name, found in calibration.items()} if over_rows else {}
    quantized: dict[ir.Value, list[ir.Value]] = {}
    for layer in list(_layers(model.graph)):
        if layer.input not in quantized:
            quantized[layer.input] = _quantize_input(model.graph, layer, fixed.get(str(layer.input.name)))
        _replace_product(model.graph, layer, *quantized[layer.input])
    for node in list(model.graph):
        if node.op_type == "Gather":
            _quantize_table(model.graph, node)
        elif node.op_type == "MatMul":
            _store_stack(model.graph, node)
    model.opset_imports[MICROSOFT] = 1
    RemoveUnusedNodesPass()(model)
    ir.save(model, file)


def _quantize_input(graph: ir.Graph, layer: Layer, fixed: Range | None) -> list[ir.Value]:
    """What a layer reads, as unsigned bytes with scale and zero point."""
    name = layer.input.name
    if fixed is None:
        node = ir.node("DynamicQuantizeLinear", [layer.input], num_outputs=3, name=f"{name}_quantize")
        graph.insert_before(layer.node, node)
        return list(node.outputs)
    low, high = min(fixed[0], 0.0), max(fixed[1], 0.0)  # zero must be one of the steps
    scale = np.float32((high - low) / 255 or 1.0)
    zero = np.uint8(np.clip(np.rint(-low / scale), 0, 255))
    constants = [_constant(graph, f"{name}_scale", np.array(scale)), _constant(graph, f"{name}_zero", np.array(zero))]
    node = ir.node("QuantizeLinear", [layer.input, *constants], name=f"{name}_quantize")
    graph.insert_before(layer.node, node)
    return [node.outputs[0], *constants]


def _replace_product(graph: ir.Graph, layer: Layer, values: ir.Value, scale: ir.Value, zero: ir.Value) -> None:
    """Product, scales and bias as one node of ONNX Runtime."""
    name = layer.node.name or layer.output.name
    steps, column_scales = _signed_bytes(layer.weight, axis=0)
    weight = _constant(graph, f"{name}_weight", steps)
    scales = _constant(graph, f"{name}_weight_scale", column_scales[0])
    given = [values, weight, scale, scales, zero, None, layer.bias]
    node = ir.node("MatMulIntegerToFloat", given, domain=MICROSOFT, name=f"{name}_int8")
    node.outputs[0].shape, node.outputs[0].type = layer.output.shape, layer.output.type
    graph.insert_before(layer.node, node)
    layer.output.replace_all_uses_with(node.outputs[0])


def _quantize_table(graph: ir.Graph, node: ir.Node) -> None:
    """Rows of a large table (V, D) as signed bytes times a scale for each row."""
    table, indices = node.inputs
    assert table is not None
    constant = ir.convenience.get_const_tensor(table)
    if constant is None or len(constant.shape) != 2 or len(constant.numpy()) < LARGE_TABLE_ROWS:
        return
    steps, row_scales = _signed_bytes(constant.numpy(), axis=1)
    rows = ir.node("Gather", [_constant(graph, f"{table.name}_int8", steps), indices], {"axis": 0})
    scales = ir.node("Gather", [_constant(graph, f"{table.name}_scale", row_scales), indices], {"axis": 0})
    floats = ir.node("Cast", [rows.outputs[0]], {"to": ir.DataType.FLOAT})
    scaled = ir.node("Mul", [floats.outputs[0], scales.outputs[0]])
    scaled.outputs[0].shape, scaled.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
    graph.insert_before(node, [rows, scales, floats, scaled])
    node.outputs[0].replace_all_uses_with(scaled.outputs[0])


def _store_stack(graph: ir.Graph, node: ir.Node) -> None:
    """A stack of matrices (H, in, out), see one_query.py, as signed bytes with a scale for each output channel.

    They are a row's work, not a piece's: ONNX Runtime makes them float32 once, when it loads the graph.
    """
    stack = node.inputs[1]
    tensor = ir.convenience.get_const_tensor(stack) if stack is not None else None
    if stack is None or tensor is None or len(tensor.shape) != 3:
        return
    steps, scales = _signed_bytes(tensor.numpy(), axis=1)
    floats = ir.node("Cast", [_constant(graph, f"{stack.name}_int8", steps)], {"to": ir.DataType.FLOAT})
    scaled = ir.node("Mul", [floats.outputs[0], _constant(graph, f"{stack.name}_scale", scales)])
    graph.insert_before(node, [floats, scaled])
    node.replace_input_with(1, scaled.outputs[0])


def _signed_bytes(weight: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """(steps of -127 to 127, scales): weight ~ steps * scales, one scale for all along `axis`."""
    largest = np.abs(weight).max(axis, keepdims=True)
    scales = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return np.rint(weight / scales).astype(np.int8), scales


def _constant(graph: ir.Graph, name: str, values: np.ndarray) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(values, name=name))
    graph.register_initializer(value)
    return value


@dataclass(frozen=True)
class Candidate:
    """An 8-bit graph as it was measured on the validation split."""

    name: str
    metric: float
    """The deciding figure, higher is better."""
    latency_ms: float
    bytes: int


def choose(candidates: Sequence[Candidate], metric: str, float32: float, max_loss_points: float) -> Candidate:
    """The fastest of those that lose at most `max_loss_points` hundredths of `metric` against `float32`.

    Of candidates as fast as the fastest (within SIMILAR) the one with the better figure, then the smaller one.

    Raises:
        UserError: every one loses more; the message says how much each does.
    """
    kept = [one for one in candidates if _loss_points(one, float32) <= max_loss_points + 1e-9]
    if not kept:
        told = ", ".join(f"{one.name} {one.metric:.4f} ({_loss_points(one, float32):.2f} lost)" for one in candidates)
        raise UserError(
            f"export.max_int8_loss_points: int8 may lose {max_loss_points:g} points of the validation {metric}, which "
            f"is {float32:.4f} in float32, and every way into int8 loses more: {told}. Raise the limit, or leave int8 "
            "out of export.to. No artefact was written."
        )
    fastest = min(one.latency_ms for one in kept)
    similar = [one for one in kept if one.latency_ms <= fastest * (1 + SIMILAR)]
    return min(similar, key=lambda one: (-one.metric, one.bytes, one.latency_ms))


def _loss_points(candidate: Candidate, float32: float) -> float:
    return 100 * (float32 - candidate.metric)
