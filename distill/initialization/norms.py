"""Fitting a student's LayerNorms, and the matrix behind narrow embeddings, to what the teacher gives, in one forward
pass.
All other weights are left to cut.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.activations import model_inputs
from distill.initialization.observe import run_body

RCOND = 1e-4
"""Singular values of the sample below this share of its largest are noise."""


@torch.no_grad()
def fit_norms(
    small: PreTrainedModel,
    norms: Sequence[nn.Module],
    goals: Sequence[Sequence[Tensor]],
    subspace: Tensor,
    batches: Sequence[Mapping[str, Tensor]],
) -> None:
    """Give each module the weights that bring its output closest to the teacher's, seen in the subspace: a LayerNorm
    its gain and bias, a linear layer (behind the norm of narrow embeddings) its matrix.

    Of a norm coordinate by coordinate least squares of y = P' h_t on the normalised input x: gain = Cov[x, y] / Var[x],
    bias = E[y] - gain E[x]; of a linear layer least squares of y on (x, 1). The sample goes through as one batch, and a
    module is fitted the moment the forward reaches it: on what the fitted ones below it give.

    Args:
        small: the student's encoder, eval mode.
        norms: LayerNorms and linear layers, in the order in which the forward meets them.
        goals: for each of them the teacher's h_t, (N, D_t) by batch, of the batches' real tokens in their order.
        subspace: P, (D_t, D_s).
    """
    batch = _joined([model_inputs(small, batch) for batch in batches], small.config.pad_token_id or 0)
    valid = batch["attention_mask"].cpu().bool()

    def fitting(goal: Sequence[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def fit(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            # In float64, and so on the CPU, as in observe.py.
            y = (torch.cat(list(goal)) @ subspace.float()).double()
            if isinstance(module, nn.Linear):
                _fit_linear(module, inputs[0].cpu()[valid].double(), y)
            else:
                normalised = nn.functional.layer_norm(inputs[0], module.normalized_shape, eps=module.eps)
                _fit_gains(module, normalised.cpu()[valid].double(), y)

        return fit

    handles = [norm.register_forward_pre_hook(fitting(goal)) for norm, goal in zip(norms, goals, strict=True)]
    try:
        run_body(small, batch)
    finally:
        for handle in handles:
            handle.remove()


def _fit_gains(norm: nn.LayerNorm, x: Tensor, y: Tensor) -> None:
    centred = x - x.mean(0)
    gain = (centred * y).mean(0) / centred.square().mean(0).clamp(min=1e-6)
    norm.weight.copy_(gain)
    norm.bias.copy_(y.mean(0) - gain * x.mean(0))


def _fit_linear(linear: nn.Linear, x: Tensor, y: Tensor) -> None:
    """Least squares; the smallest solution where the sample does not settle it. Normalised rows add up to nothing, but
    for float32's rounding: one direction at least is told by rcond to be none."""
    ones = torch.ones(len(x), 1).to(x)
    solved = torch.linalg.lstsq(torch.cat((x, ones), dim=1), y, rcond=RCOND, driver="gelsd").solution
    linear.weight.copy_(solved[:-1].T)
    linear.bias.copy_(solved[-1])


def _joined(batches: Sequence[Mapping[str, Tensor]], pad: int) -> dict[str, Tensor]:
    """One batch of them all, padded to the longest."""
    length = max(batch["input_ids"].shape[1] for batch in batches)

    def joined(name: str, value: int) -> Tensor:
        return torch.cat([nn.functional.pad(b[name], (0, length - b[name].shape[1]), value=value) for b in batches])

    return {name: joined(name, pad if name == "input_ids" else 0) for name in batches[0]}
