"""Claims about each loss term on logits and labels; the oracles write the distributions out in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from distill.activations import Activations
from distill.losses import (
    IGNORED,
    LabelLoss,
    Logits,
    LogitsLoss,
    Match,
)
from tests.loss_cases import (
    LABELS,
    LAYERS,
    LENGTHS,
    C,
    T,
    as_array,
    assert_close,
    evaluate,
    make_batch,
    pair_of,
    softmax,
)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def divergence(teacher: np.ndarray, student: np.ndarray, form: str, temperature: float) -> float:
    """Of two distributions over the last axis, as written in the papers."""
    if form == "published":
        return -float(np.sum(teacher * np.log(student))) / len(teacher)
    return temperature**2 * float(np.sum(teacher * np.log(teacher / student)))


def logits_oracle(logits: Logits, form: str, temperature: float) -> list[float]:
    student, teacher = (as_array(side.logits) for side in pair_of(logits) if side.logits is not None)
    values = []
    for s, t, n in zip(student / temperature, teacher / temperature, LENGTHS, strict=True):
        if logits is Logits.CLASSES:
            parts = [divergence(softmax(t), softmax(s), form, temperature)]
        elif logits is Logits.TOKEN_CLASSES:
            parts = [divergence(softmax(t[i]), softmax(s[i]), form, temperature) for i in range(n)]
        elif logits is Logits.SPAN:
            parts = [divergence(softmax(t[:n, e]), softmax(s[:n, e]), form, temperature) for e in (0, 1)]
        elif logits is Logits.BINARIES:
            # A yes-or-no label is a distribution over two classes; no second division is made by them.
            yes = np.stack((sigmoid(t), 1 - sigmoid(t))), np.stack((sigmoid(s), 1 - sigmoid(s)))
            twice = 2 if form == "published" else 1
            parts = [twice * divergence(yes[0][:, c], yes[1][:, c], form, temperature) for c in range(C)]
        else:
            parts = [float((s[0] - t[0]) ** 2) * temperature**2]  # the number itself, the temperature unused
        values.append(math.fsum(parts) / len(parts))
    return values


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("form", ["kl", "published"])
@pytest.mark.parametrize("logits", list(Logits))
def test_logits_loss_is_the_divergence_written_out(logits: Logits, form: Any, temperature: float) -> None:
    assert_close(
        evaluate(LogitsLoss(form=form, temperature=temperature), logits), logits_oracle(logits, form, temperature)
    )


def test_logits_loss_by_hand() -> None:
    """p_t = (3/4, 1/4) against (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2)."""
    student = Activations(logits=torch.zeros(1, 2))
    teacher = Activations(logits=torch.tensor([[math.log(3), 0.0]]))
    batch, match = {"attention_mask": torch.ones(1, 1)}, Match(LAYERS, Logits.CLASSES)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert_close(LogitsLoss()(student, teacher, batch, match), [expected])
    assert_close(LogitsLoss(form="published")(student, teacher, batch, match), [math.log(2) / 2])


@pytest.mark.parametrize("temperature", [1.0, 4.0, 50.0])
def test_the_gradient_on_logits_is_t_times_the_difference_of_probabilities(temperature: float) -> None:
    """dL/dz_s = T (p_s - p_t); for large T that tends to (z_s - z_t) / C, centred, and does not vanish."""
    student, teacher = pair_of()
    assert student.logits is not None
    assert teacher.logits is not None
    student.logits.requires_grad_()
    LogitsLoss(temperature=temperature)(student, teacher, make_batch(), Match(LAYERS, Logits.CLASSES)).sum().backward()
    assert student.logits.grad is not None

    pairs = zip(as_array(student.logits) / temperature, as_array(teacher.logits) / temperature, strict=True)
    expected = np.stack([temperature * (softmax(s) - softmax(t)) for s, t in pairs])
    np.testing.assert_allclose(student.logits.grad.numpy(), expected, rtol=1e-4, atol=1e-6)


def labels_oracle(logits: Logits, labels: np.ndarray) -> list[float]:
    student = pair_of(logits)[0].logits
    assert student is not None
    values = []
    for z, label, n in zip(as_array(student), labels, LENGTHS, strict=True):
        if logits is Logits.CLASSES:
            parts = [-math.log(softmax(z)[label])]
        elif logits is Logits.BINARIES:
            parts = [-math.log(sigmoid(z)[c] if label[c] else 1 - sigmoid(z)[c]) for c in range(C)]
        elif logits is Logits.VALUE:
            parts = [float((z[0] - label) ** 2)]
        elif logits is Logits.TOKEN_CLASSES:
            parts = [-math.log(softmax(z[i])[label[i]]) for i in range(T) if label[i] != IGNORED]
        else:
            parts = [-math.log(softmax(z[:n, e])[label[e]]) for e in (0, 1)]
        values.append(math.fsum(parts) / max(1, len(parts)))
    return values


@pytest.mark.parametrize("logits", list(Logits))
def test_label_loss_is_the_tasks_own(logits: Logits) -> None:
    labels = torch.tensor(LABELS[logits])
    assert_close(evaluate(LabelLoss(), logits, labels=labels), labels_oracle(logits, labels.numpy()))
    assert not LabelLoss.uses_teacher
