"""Claims about distill/export/graph.py, passes.py and runtime.py: an ONNX graph says what the model says, for batches
of any size and length, and computes no more than its head reads. Whole exports are test_export.py's."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from distill.activations import model_inputs, read_logits
from distill.export.graph import export_graph
from distill.export.one_query import fold_keys_and_values
from distill.export.passes import drop_reshapes, keep_first_piece
from distill.export.runtime import ArtefactModel
from distill.losses import Logits
from distill.tasks import TASKS
from tests.conftest import BuildModel, MakeBatch, _model

LABELS = {"question_answering": 2, "regression": 1}
RAGGED = ((9, 5, 3, 7), (1,), (33, 12), (2,) * 7)
"""Lengths of the rows of batches; none is the exported one's size."""


def model_of(family: str, task: str) -> PreTrainedModel:
    kind = TASKS[task]
    changes = {"num_hidden_layers": 2, "num_labels": LABELS.get(task, 3), "problem_type": kind.problem_type}
    if family == "distilbert":
        changes["n_layers"] = 2
    return _model(family, kind.auto_class, 0, tuple(sorted(changes.items())))


@cache
def exported(family: str, auto_class: Any, labels: int) -> Path:
    """Exported once for all that asks: single-label, multi-label and regression heads differ in their width alone."""
    task = next(name for name, kind in TASKS.items() if kind.auto_class is auto_class and LABELS.get(name, 3) == labels)
    file = Path(mkdtemp(prefix="tinybert-tests-")) / "model.onnx"
    ids = torch.randint(5, 60, (2, 8), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    export_graph(model_of(family, task), batch, file)
    return file


def both_logits(model: PreTrainedModel, graph: ArtefactModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of pieces that are no padding: what stands on padding is nobody's."""
    with torch.inference_mode():
        expected = read_logits(model(**model_inputs(model, batch)))
        found = read_logits(graph(**model_inputs(graph, batch)))  # type: ignore[arg-type]
    assert found.shape == expected.shape
    real = batch["attention_mask"].bool()
    return (found[real], expected[real]) if expected.ndim == 3 else (found, expected)


def require_equal_logits(family: str, task: str, make_batch: MakeBatch) -> ArtefactModel:
    model = model_of(family, task)
    graph = ArtefactModel(exported(family, TASKS[task].auto_class, LABELS.get(task, 3)), model.config)
    for seed, lengths in enumerate(RAGGED):
        found, expected = both_logits(model, graph, make_batch(lengths, seed))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    return graph


@pytest.mark.parametrize("task", TASKS)
def test_logits_are_the_models_on_ragged_batches(task: str, make_batch: MakeBatch) -> None:
    graph = require_equal_logits("bert", task, make_batch)
    assert graph.runner.takes == ["input_ids", "attention_mask", "token_type_ids"]
    assert graph.runner.gives == (["start_logits", "end_logits"] if TASKS[task].logits is Logits.SPAN else ["logits"])


def test_a_family_without_token_types_gives_a_graph_without_them(make_batch: MakeBatch) -> None:
    graph = require_equal_logits("distilbert", "single_label_classification", make_batch)
    assert graph.runner.takes == ["input_ids", "attention_mask"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["roberta", "electra", "albert", "camembert", "modernbert", "mpnet", "deberta-v2"])
def test_logits_are_the_models_in_other_families(family: str, make_batch: MakeBatch) -> None:
    require_equal_logits(family, "single_label_classification", make_batch)


def test_padding_does_not_change_the_logits(make_batch: MakeBatch) -> None:
    graph = ArtefactModel(
        exported("bert", AutoModelForSequenceClassification, 3), model_of("bert", "regression").config
    )
    together = make_batch((4, 19))
    alone = {name: tensor[:1, :4] for name, tensor in together.items() if tensor.ndim == 2}
    with torch.inference_mode():
        first, only = (graph(**model_inputs(graph, batch))["logits"][0] for batch in (together, alone))  # type: ignore[arg-type]
    torch.testing.assert_close(first, only, atol=1e-5, rtol=0)


def test_batch_and_length_are_dynamic_by_name(build_model: BuildModel) -> None:
    graph = onnx.load(exported("bert", AutoModelForSequenceClassification, 3)).graph
    for given in graph.input:
        assert [dim.dim_param for dim in given.type.tensor_type.shape.dim] == ["batch", "length"]


def test_the_model_is_left_as_it_was() -> None:
    exported("bert", AutoModelForSequenceClassification, 3)
    assert model_of("bert", "single_label_classification").config._attn_implementation == "sdpa"


def operators(file: Path) -> list[str]:
    return [node.op_type for node in onnx.load(file).graph.node]


def test_attention_is_one_node_a_layer_and_nothing_is_reshaped() -> None:
    found = operators(exported("bert", TASKS["token_classification"].auto_class, 3))
    assert found.count("Attention") == found.count("Gelu") == 2
    assert found.count("LayerNormalization") == 1 + 2 * 2
    assert "Reshape" not in found
    assert "Softmax" not in found


def test_the_last_layer_of_a_sequence_head_computes_one_piece() -> None:
    graph = onnx.load(exported("bert", AutoModelForSequenceClassification, 3)).graph
    widths = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in graph.value_info
    }
    inner = [node for node in graph.node if node.op_type == "Gelu"]
    assert [widths[node.output[0]][1] for node in inner] == ["length", 1]


def products(graph: onnx.GraphProto) -> list[tuple[int, ...]]:
    """The shapes of the matrices that something is multiplied by, sorted."""
    shapes = {one.name: tuple(one.dims) for one in graph.initializer}
    return sorted(shapes[node.input[1]] for node in graph.node if node.op_type == "MatMul" and node.input[1] in shapes)


def test_the_last_layers_keys_and_values_are_products_of_a_row_for_each_head() -> None:
    """2 layers, 16 wide, 24 inner, 2 heads: the first has keys and values of every piece, the last has none."""
    first, last = [(16, 16)] * 4 + [(16, 24), (24, 16)], [(16, 16)] * 2 + [(16, 24), (24, 16), (2, 8, 16), (2, 16, 8)]
    graph = onnx.load(exported("bert", AutoModelForSequenceClassification, 3)).graph
    assert products(graph) == sorted(first + last)
    assert [node.op_type for node in graph.node].count("Attention") == 1
    tokens = onnx.load(exported("bert", TASKS["token_classification"].auto_class, 3)).graph
    assert products(tokens) == sorted([*first, *first, (16, 3)]), "where every piece is read nothing changes"


def attention_graph(**changes: object) -> onnx.ModelProto:
    """Attention of one query over hidden states x (B, T, 6), with 2 heads, biases and a mask (B, 1, 1, T)."""
    random = np.random.default_rng(0)
    query = changes.get("query", 1)
    shapes = {"x": ["B", "T", 6], "q": ["B", query, 6], "m": ["B", 1, query, "T"], "y": ["B", query, 6]}
    info = {name: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    other = changes.get("values_of", "x")
    nodes = [
        helper.make_node("MatMul", ["x", "K"], ["xk"]),
        helper.make_node("Add", ["xk", "k"], ["keys"]),
        helper.make_node("Neg", ["x"], ["minus"]),
        helper.make_node("MatMul", [str(other), "V"], ["xv"]),
        helper.make_node("Add", ["v", "xv"], ["values"]),
        helper.make_node(
            "Attention", ["q", "keys", "values", "m"], ["a"], q_num_heads=2, kv_num_heads=2, scale=0.7, name="attention"
        ),
        helper.make_node("Identity", ["a"], ["y"]),
    ]
    weights = {
        name: random.normal(size=(6, 6) if name.isupper() else 6).astype(np.float32) for name in ("K", "V", "k", "v")
    }
    constants = [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "one", [info["x"], info["q"], info["m"]], [info["y"]], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def test_one_query_without_keys_and_values_is_the_same_attention() -> None:
    """The oracle is numpy's float64, by the definition: keys and values with their biases, a softmax for each head."""
    before = attention_graph()
    program = ir.from_proto(before)
    fold_keys_and_values(program.graph)
    RemoveUnusedNodesPass()(program)
    after = ir.to_proto(program)
    assert "Attention" not in [node.op_type for node in after.graph.node]
    random = np.random.default_rng(1)
    B, T = 3, 5
    x, q = random.normal(size=(B, T, 6)), random.normal(size=(B, 1, 6))
    m = np.where(random.random((B, 1, 1, T)) < 0.3, np.finfo(np.float32).min, 0.0)
    m[..., 0] = 0
    W = {one.name: numpy_helper.to_array(one).astype(np.float64) for one in before.graph.initializer}
    keys, values = (x @ W["K"] + W["k"]).reshape(B, T, 2, 3), (x @ W["V"] + W["v"]).reshape(B, T, 2, 3)
    scores = np.einsum("bhd,bthd->bht", q.reshape(B, 2, 3), keys) * 0.7 + m[:, 0]
    p = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bht,bthd->bhd", p / p.sum(-1, keepdims=True), values).reshape(B, 1, 6)
    feed = {name: value.astype(np.float32) for name, value in {"x": x, "q": q, "m": m}.items()}
    (found,) = onnxruntime.InferenceSession(after.SerializeToString()).run(None, feed)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("changes", [{"query": "T"}, {"values_of": "minus"}], ids=["every query", "other values"])
def test_other_attention_stays(changes: dict[str, object]) -> None:
    program = ir.from_proto(attention_graph(**changes))
    before = [node.op_type for node in program.graph]
    fold_keys_and_values(program.graph)
    assert [node.op_type for node in program.graph] == before


def test_a_head_of_tokens_computes_every_piece() -> None:
    kind = TASKS["token_classification"]
    graph = onnx.load(exported("bert", kind.auto_class, 3)).graph
    assert not [node for node in graph.node if node.op_type == "Slice" and node.name.endswith("_first")]


# The passes alone, on a graph of three nodes


def small_graph(outputs: tuple[str, ...]) -> onnx.ModelProto:
    """y = gelu(x W)[:, 0]; the outputs are y and, where asked for, all of h = x W."""
    weight = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["h"]),
        helper.make_node("Gelu", ["h"], ["g"]),
        helper.make_node("Gather", ["g", "zero"], ["y"], axis=1),
    ]
    shapes = {"h": ["B", "T", 6], "g": ["B", "T", 6], "y": ["B", 6], "x": ["B", "T", 4]}
    info = {name: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    graph = helper.make_graph(
        nodes,
        "small",
        [info["x"]],
        [info[name] for name in outputs],
        [onnx.numpy_helper.from_array(weight, "W"), onnx.numpy_helper.from_array(np.array(0), "zero")],
        value_info=[info[name] for name in ("h", "g") if name not in outputs],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})  # type: ignore[no-any-return]


@pytest.mark.parametrize(("outputs", "moved"), [(("y",), True), (("y", "h"), False)])
def test_pieces_that_an_output_shows_are_computed(outputs: tuple[str, ...], moved: bool) -> None:
    before = small_graph(outputs)
    program = ir.from_proto(before)
    keep_first_piece(program.graph)
    after = ir.to_proto(program)
    x = np.random.default_rng(1).normal(size=(3, 5, 4)).astype(np.float32)
    for one, other in zip(run(before, x), run(after, x), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-6)
    first = next(node for node in after.graph.node if node.op_type == "Slice")
    assert (first.input[0] == "x") is moved, "the cut stands before the product unless all of it is asked for"


def test_a_reshape_that_changes_the_shape_stays() -> None:
    nodes = [
        helper.make_node("Reshape", ["x", "apart"], ["heads"]),
        helper.make_node("Reshape", ["heads", "together"], ["same"]),
        helper.make_node("Reshape", ["heads", "flat"], ["y"]),
        helper.make_node("Identity", ["same"], ["z"]),
    ]
    shapes = {"x": [2, 3, 4], "heads": [2, 3, 2, 2], "same": [2, 3, 4], "y": [6, 4], "z": [2, 3, 4]}
    info = {name: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    numbers = {"apart": [2, 3, 2, 2], "together": [2, 3, 4], "flat": [6, 4]}
    constants = [onnx.numpy_helper.from_array(np.array(value), name) for name, value in numbers.items()]
    graph = helper.make_graph(
        nodes, "reshapes", [info["x"]], [info["y"], info["z"]], constants, value_info=[info["heads"], info["same"]]
    )
    before = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    program = ir.from_proto(before)
    drop_reshapes(program.graph)
    after = ir.to_proto(program)
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for one, other in zip(run(before, x), run(after, x), strict=True):
        np.testing.assert_array_equal(other, one)
    assert next(node for node in after.graph.node if node.op_type == "Identity").input[0] == "x"


def test_sums_are_not_joined_with_layer_norms_on_loading(tmp_path: Path) -> None:
    """SkipLayerNormalization is slow on a CPU; a session with default options is what a server opens."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    onnxruntime.InferenceSession(exported("bert", AutoModelForSequenceClassification, 3), options)
    found = operators(tmp_path / "loaded.onnx")
    assert found.count("LayerNormalization") == 1 + 2 * 2
    assert not [name for name in found if name.startswith("Skip")]
