"""Where a family keeps the parts of its encoder, under one set of names.
What is done with them is left to cut.py and observe.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from distill.families import BERT_LAYERS


@dataclass(frozen=True)
class Layer:
    """The parts of one encoder layer with its LayerNorms behind the sums, as modules."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_output: nn.Linear
    attention_norm: nn.LayerNorm
    inner: nn.Linear
    outer: nn.Linear
    output_norm: nn.LayerNorm


def _bert(body: Any) -> list[Layer]:
    return [
        Layer(
            query=layer.attention.self.query,
            key=layer.attention.self.key,
            value=layer.attention.self.value,
            attention_output=layer.attention.output.dense,
            attention_norm=layer.attention.output.LayerNorm,
            inner=layer.intermediate.dense,
            outer=layer.output.dense,
            output_norm=layer.output.LayerNorm,
        )
        for layer in body.encoder.layer
    ]


def _distilbert(body: Any) -> list[Layer]:
    return [
        Layer(
            query=layer.attention.q_lin,
            key=layer.attention.k_lin,
            value=layer.attention.v_lin,
            attention_output=layer.attention.out_lin,
            attention_norm=layer.sa_layer_norm,
            inner=layer.ffn.lin1,
            outer=layer.ffn.lin2,
            output_norm=layer.output_layer_norm,
        )
        for layer in body.transformer.layer
    ]


LAYOUTS: Mapping[str, Callable[[Any], list[Layer]]] = {
    "bert": _bert,
    "roberta": _bert,
    "xlm-roberta": _bert,
    "camembert": _bert,
    "electra": _bert,
    "ernie": _bert,
    "distilbert": _distilbert,
}
"""Families out of which students can be cut, by model_type."""


def alike(family: str, other: str) -> bool:
    """Whether layers of one family do what the other's do, so that one can be cut out of the other."""
    return (family == other and family in LAYOUTS) or {family, other} <= BERT_LAYERS


def encoder_layers(model: PreTrainedModel) -> list[Layer]:
    """The layers of a model of one of LAYOUTS, with or without a task head, from the first up."""
    return LAYOUTS[model.config.model_type](model.base_model)
