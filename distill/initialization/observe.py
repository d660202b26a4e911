"""One pass over a sample of real text that sees everything of the teacher that cutting needs.
What is made of it is left to cut.py and norms.py."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.activations import model_inputs
from distill.initialization.layout import Layer


class Moments:
    """Running sums over rows x, on the CPU in float64: float32 loses the small directions of a long sum.

    groups: how many blocks of one width the columns fall into; products are taken within a block alone.
    """

    def __init__(self, groups: int, columns: int) -> None:
        width = columns // groups
        self.rows = 0
        self.sums = torch.zeros(groups, width, dtype=torch.float64)
        self.products = torch.zeros(groups, width, width, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        blocks = rows.double().view(len(rows), *self.sums.shape).transpose(0, 1)
        self.rows += len(rows)
        self.sums += blocks.sum(1)
        self.products += blocks.mT @ blocks

    @property
    def mean(self) -> Tensor:
        """E[x], (groups, width)."""
        return self.sums / self.rows

    @property
    def second(self) -> Tensor:
        """E[x x'], (groups, width, width)."""
        return self.products / self.rows

    @property
    def covariance(self) -> Tensor:
        """E[x x'] - E[x] E[x]', (groups, width, width)."""
        return self.second - self.mean[:, :, None] * self.mean[:, None, :]


@dataclass(frozen=True)
class LayerView:
    """context: moments of the attention-weighted values before the output matrix, a group a head. inner: of the
    feed-forward neurons after the activation, a group each."""

    context: Moments
    inner: Moments


@dataclass(frozen=True)
class View:
    """What the teacher does on the sample's N real tokens.

    moments: of every hidden state, 0 the embeddings' output. states: the hidden states themselves of the embeddings
    and the mapped layers, (N, D) float32 by batch. layers: inside the mapped layers, counted from 1.
    """

    moments: list[Moments]
    states: dict[int, list[Tensor]]
    layers: dict[int, LayerView]


@torch.no_grad()
def observe(
    body: PreTrainedModel, layers: Sequence[Layer], mapped: Collection[int], batches: Sequence[Mapping[str, Tensor]]
) -> View:
    """Run the teacher over the sample once.

    Args:
        body: the encoder, eval mode, on the batches' device.
        mapped: layers to look into, counted from 1.
    """
    width, heads = body.config.hidden_size, body.config.num_attention_heads
    view = View([Moments(1, width) for _ in range(len(layers) + 1)], {0: []}, {})
    probes: dict[str, nn.Module] = {}
    for g in sorted(set(mapped)):
        inner = layers[g - 1].outer.in_features
        view.states[g], view.layers[g] = [], LayerView(Moments(heads, width), Moments(inner, inner))
        probes |= {f"context {g}": layers[g - 1].attention_output, f"inner {g}": layers[g - 1].outer}
    for batch in batches:
        valid = batch["attention_mask"].cpu().bool()

        def real(tensor: Tensor, valid: Tensor = valid) -> Tensor:
            # Picked on the CPU: a device would be waited for to learn how many rows there are.
            return tensor.float().cpu()[valid]

        with _inputs(probes) as seen:
            hidden = [real(state) for state in run_body(body, batch).hidden_states]
        for moments, rows in zip(view.moments, hidden, strict=True):
            moments.add(rows)
        for g, kept in view.states.items():
            kept.append(hidden[g])
        for g, layer in view.layers.items():
            layer.context.add(real(seen[f"context {g}"]))
            layer.inner.add(real(seen[f"inner {g}"]))
    return view


def run_body(body: PreTrainedModel, batch: Mapping[str, Tensor]) -> Any:
    """The encoder's output, hidden states included."""
    return body(**model_inputs(body, batch), output_hidden_states=True)


@contextmanager
def _inputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """What goes into each module in one forward, by name."""
    seen: dict[str, Tensor] = {}

    def probe(name: str) -> Any:
        return lambda module, inputs: seen.update({name: inputs[0]})

    handles = [module.register_forward_pre_hook(probe(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
