"""Whether a processor computes bf16 products in hardware.
What is computed in bf16, and what that may change, is left to masked_lm.py and vectors.py."""

from __future__ import annotations

from typing import Any

import torch


def has_bf16(device: torch.device) -> bool:
    """By its capabilities, not by a measurement: all processes must decide alike."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
