"""Claims about distill/augmentation/inference_linear.py: it is the layer it replaces, however many rows it gets."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from distill.augmentation.inference_linear import InferenceLinear


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_new", "relu"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("rows", [1, 3, 130])
def test_it_computes_what_linear_and_activation_do(
    activation: str | None, dtype: torch.dtype, tolerance: float, rows: int
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 80).to(dtype)
    inputs = torch.randn(rows, 48).to(dtype)
    function = ACT2FN[activation] if activation else None
    with torch.inference_mode():
        found = InferenceLinear(linear.weight, linear.bias, function)(inputs)
        exact = linear.double()(inputs.double())
        expected = function(exact) if function else exact
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
