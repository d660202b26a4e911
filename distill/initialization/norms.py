"""Fitting a student's LayerNorms to what the teacher's give, in one forward pass.
All other weights are left to cut.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.activations import model_inputs
from distill.initialization.observe import run_body


@torch.no_grad()
def fit_norms(
    small: PreTrainedModel,
    norms: Sequence[nn.LayerNorm],
    goals: Sequence[Sequence[Tensor]],
    subspace: Tensor,
    batches: Sequence[Mapping[str, Tensor]],
) -> None:
    """Give each LayerNorm the gain and bias that bring its output closest to the teacher's, seen in the subspace.

    Coordinate by coordinate least squares of y = P' h_t on the normalised input x: gain = Cov[x, y] / Var[x], bias =
    E[y] - gain E[x]. The sample goes through as one batch, and a norm is fitted the moment the forward reaches it: on
    what the fitted ones below it give.

    Args:
        small: the student's encoder, eval mode.
        norms: in the order in which the forward meets them.
        goals: for each norm the teacher's h_t, (N, D_t) by batch, of the batches' real tokens in their order.
        subspace: P, (D_t, D_s).
    """
    batch = _joined([model_inputs(small, batch) for batch in batches], small.config.pad_token_id or 0)
    valid = batch["attention_mask"].cpu().bool()

    def fitting(goal: Sequence[Tensor]) -> Callable[[nn.LayerNorm, tuple[Tensor, ...]], None]:
        def fit(norm: nn.LayerNorm, inputs: tuple[Tensor, ...]) -> None:
            normalised = nn.functional.layer_norm(inputs[0], norm.normalized_shape, eps=norm.eps)
            # Means in float64, and so on the CPU, as in observe.py.
            x, y = normalised.cpu()[valid].double(), (torch.cat(list(goal)) @ subspace.float()).double()
            centred = x - x.mean(0)
            gain = (centred * y).mean(0) / centred.square().mean(0).clamp(min=1e-6)
            norm.weight.copy_(gain)
            norm.bias.copy_(y.mean(0) - gain * x.mean(0))

        return fit

    handles = [norm.register_forward_pre_hook(fitting(goal)) for norm, goal in zip(norms, goals, strict=True)]
    try:
        run_body(small, batch)
    finally:
        for handle in handles:
            handle.remove()


def _joined(batches: Sequence[Mapping[str, Tensor]], pad: int) -> dict[str, Tensor]:
    """One batch of them all, padded to the longest."""
    length = max(batch["input_ids"].shape[1] for batch in batches)

    def joined(name: str, value: int) -> Tensor:
        return torch.cat([nn.functional.pad(b[name], (0, length - b[name].shape[1]), value=value) for b in batches])

    return {name: joined(name, pad if name == "input_ids" else 0) for name in batches[0]}
