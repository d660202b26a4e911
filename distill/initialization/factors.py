"""The algebra of cutting: thin singular factors of a product, roots of a second moment, principal directions.
What is factored is left to cut.py. Everything is float64, on the CPU: some accelerators have no float64, and a student
should not depend on where it was cut."""

from __future__ import annotations

import torch
from torch import Tensor


def product_svd(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of A B' without ever making it.

    A = Qa Ra and B = Qb Rb (thin QR) give A B' = Qa (Ra Rb') Qb', so only the small Ra Rb' is decomposed: O(n d^2)
    where the product's own decomposition is O(n^3).

    Args:
        a, b: (..., n, d) and (..., m, d).

    Returns:
        Left vectors (..., n, k), singular values (..., k) from the largest, right vectors (..., k, m), where
        k = min(n, d, m). A left vector's entry of largest size is positive.
    """
    (qa, ra), (qb, rb) = torch.linalg.qr(a), torch.linalg.qr(b)
    u, singular, vh = torch.linalg.svd(ra @ rb.mT, full_matrices=False)
    left, right = qa @ u, vh @ qb.mT
    signs = _signs(left)
    return left * signs, singular, right * signs.mT


def roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """C^1/2 and its pseudo-inverse, symmetric; eigenvalues below 1e-9 of the largest are raised to that."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp(min=values[-1] * 1e-9)
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T


def principal_directions(moment: Tensor, count: int) -> Tensor:
    """The `count` leading eigenvectors of a symmetric (D, D), as columns from the leading one, (D, count).

    For count >= D the coordinates themselves, (D, count): nothing has to be left out, so nothing is turned.
    """
    size = len(moment)
    if count >= size:
        return torch.eye(size, count, dtype=moment.dtype)
    vectors = torch.linalg.eigh(moment).eigenvectors[:, -count:].flip(1)
    return vectors * _signs(vectors)


def _signs(columns: Tensor) -> Tensor:
    """The sign of each column's entry of largest size, (..., 1, k): a singular vector's own sign is arbitrary, and
    libraries choose it differently."""
    largest = columns.abs().argmax(dim=-2, keepdim=True)
    return torch.where(columns.gather(-2, largest) < 0, -1.0, 1.0).to(columns.dtype)
