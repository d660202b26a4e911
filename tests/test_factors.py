"""Claims about the algebra of cutting: thin factors are the full decomposition's, whoever computes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill.initialization.factors import principal_directions, product_svd, roots


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("n", "m", "d"),
    [(97, 97, 8), (40, 97, 8), (97, 40, 8), (5, 97, 8), (97, 5, 8), (8, 8, 8)],
    ids=lambda size: str(size),
)
def test_thin_factors_are_those_of_the_full_product_at_every_rank(n: int, m: int, d: int) -> None:
    a, b = random(3, n, d), random(3, m, d, seed=1)
    left, singular, right = product_svd(a, b)
    u, full, vh = torch.linalg.svd(a @ b.mT)
    assert singular.shape[-1] == min(n, m, d)
    for rank in range(1, min(n, m, d) + 1):
        thin = (left[..., :rank] * singular[:, None, :rank]) @ right[:, :rank]
        torch.testing.assert_close(
            thin, (u[..., :rank] * full[:, None, :rank]) @ vh[:, :rank], rtol=1e-6, atol=1e-6, msg=f"rank {rank}"
        )
    eye = torch.eye(min(n, m, d), dtype=torch.float64).expand(3, -1, -1)
    torch.testing.assert_close(left.mT @ left, eye)
    torch.testing.assert_close(right @ right.mT, eye)


def test_a_product_of_lower_rank_than_its_factors_has_singular_values_of_zero() -> None:
    a, b = random(1, 30, 6), random(1, 30, 6, seed=1)
    b[..., 3:] = 0
    left, singular, right = product_svd(a, b)
    assert (singular[0, 3:] < 1e-12 * singular[0, 0]).all()
    torch.testing.assert_close((left * singular[:, None]) @ right, a @ b.mT)


def test_factors_do_not_hang_on_the_signs_that_a_library_chooses() -> None:
    """Turning both factors' columns by one orthogonal matrix leaves the product, and so the factors, as they are."""
    a, b = random(1, 30, 6), random(1, 20, 6, seed=1)
    turn = torch.linalg.qr(random(6, 6, seed=2)).Q
    for one, other in zip(product_svd(a, b), product_svd(a @ turn, b @ turn), strict=True):
        torch.testing.assert_close(one, other)


def test_roots_multiply_to_the_moment_and_undo_each_other() -> None:
    rows = random(50, 7)
    moment = rows.T @ rows / 50
    root, inverse = roots(moment)
    torch.testing.assert_close(root @ root, moment)
    torch.testing.assert_close(root @ inverse, torch.eye(7, dtype=torch.float64))


def test_principal_directions_are_the_rows_right_singular_vectors() -> None:
    rows = random(50, 7) * torch.arange(1, 8)
    basis = principal_directions(rows.T @ rows, 3)
    vectors = torch.linalg.svd(rows).Vh[:3].T
    torch.testing.assert_close((basis.T @ vectors).abs(), torch.eye(3, dtype=torch.float64))
    assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("count", [7, 9])
def test_where_all_directions_fit_nothing_is_turned(count: int) -> None:
    rows = random(50, 7)
    assert torch.equal(principal_directions(rows.T @ rows, count), torch.eye(7, count, dtype=torch.float64))
