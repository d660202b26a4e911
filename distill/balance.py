"""How much of the gradient each loss term gives, and weights that keep the shares at their configured ratio.
Which terms there are is left to the objective, when to measure to training.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from torch import Tensor
from torch.nn.utils import get_total_norm

from distill.activations import Activations
from distill.losses import Batch
from distill.objective import Objective
from distill.students import Student

SMOOTHING = 0.7
"""Share of the old value in the running geometric mean of a term's gradient norm: a batch is a noisy measurement."""


def gradient_norms(
    student: Student, teacher: Activations, objective: Objective, batch: Batch, accelerator: Accelerator
) -> dict[str, float]:
    """Norm of the gradient of each unweighted term with respect to the student model's trained parameters.

    One forward pass of the student and one backward pass a term; a mean over processes. The projections are left out:
    they only translate. Nothing is accumulated in the parameters, and no random number of training is used up, so
    that a run which measures trains to the same bit as one that does not.

    Args:
        student: the bare module, not DDP's wrapper.
        teacher: what the objective needs of the teacher on this very batch.
        batch: on the device, with example_weight.
    """
    trained = [parameter for parameter in student.model.parameters() if parameter.requires_grad]
    device = accelerator.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), accelerator.autocast():
        activations = student(batch, objective.student_needs)
    values = objective.values(activations, teacher, batch)
    norms = []
    for index, value in enumerate(values.values(), start=1):
        gradients = torch.autograd.grad(value, trained, retain_graph=index < len(values), allow_unused=True)
        # Typed as if none could be missing; the task head has none in the intermediate phase.
        present = [gradient for gradient in cast(Sequence[Tensor | None], gradients) if gradient is not None]
        norms.append(get_total_norm(present).to(device).float())
    means: list[float] = reduce(torch.stack(norms), reduction="mean").tolist()
    return dict(zip(values, means, strict=True))


def gradient_shares(norms: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """Each term's weight * norm over the sum of all; 0 each where there is no gradient at all."""
    weighted = {name: weights[name] * norm for name, norm in norms.items()}
    total = sum(weighted.values())
    return {name: value / total if total else 0.0 for name, value in weighted.items()}


class GradientBalance:
    """Weights under which each term's share of the gradient is its configured weight's share.

    With w the configured weights and g the running (geometric) means of the terms' gradient norms, term i gets
    w_i / g_i * sum(w g) / sum(w): shares stand as w_i / sum(w), and the sum of the norms stays what it is without
    balancing, so that the learning rate and the clipping keep their meaning. A term without gradient, or of weight 0,
    keeps its weight. The norms are measured anew every `TrainingOptions.measure_gradients_every_steps` steps.

    Related: GradNorm (arXiv 1711.02257), which equalises norms by gradient descent on the weights and adapts them to
    training rates; here the ratio is the user's and the weights follow in closed form.
    """

    def __init__(self, weights: Mapping[str, float], norms: Mapping[str, float] | None = None) -> None:
        self.configured = dict(weights)
        self.norms = dict(norms or {})
        """Running means, by name; empty before the first measurement. What a checkpoint keeps."""

    def add(self, norms: Mapping[str, float]) -> None:
        """Take a measurement; norms that are zero or not finite are passed over."""
        for name, norm in norms.items():
            if norm > 0 and math.isfinite(norm):
                old = self.norms.get(name, norm)
                self.norms[name] = math.exp(SMOOTHING * math.log(old) + (1 - SMOOTHING) * math.log(norm))

    def weights(self) -> dict[str, float]:
        """What the objective is to use now."""
        measured = {name: w for name, w in self.configured.items() if w > 0 and name in self.norms}
        if not measured:
            return dict(self.configured)
        scale = sum(w * self.norms[name] for name, w in measured.items()) / sum(measured.values())
        return {**self.configured, **{name: w * scale / self.norms[name] for name, w in measured.items()}}
