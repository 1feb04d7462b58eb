from __future__ import annotations

import math

import pytest
import torch

from dge_models.ridge import Ridge


def test_parts_give_what_the_definition_gives_on_all_rows() -> None:
    x = torch.randn(60, 5, dtype=torch.float64) * torch.tensor([1.0, 10, 0.1, 3, 1]) + 4
    y = x @ torch.randn(5, dtype=torch.float64) + torch.randn(60, dtype=torch.float64)
    ridge = Ridge(5)
    for part in (slice(0, 7), slice(7, 60)):
        ridge.add(x[part], y[part])
    found = ridge.solve()
    # Least squares with a penalty, as more rows of data.
    standard = (x - x.mean(0)) / x.std(0, correction=0)
    rows = torch.cat([standard, math.sqrt(60) * torch.eye(5, dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows, torch.cat([y - y.mean(), torch.zeros(5, dtype=torch.float64)])).solution
    torch.testing.assert_close(found.weights, expected / x.std(0, correction=0))
    predicted = x @ found.weights + found.intercept
    torch.testing.assert_close(predicted.mean(), y.mean())
    assert found.left == pytest.approx((y - predicted).square().mean().item())
    assert found.explained == pytest.approx(1 - found.left / y.var(correction=0).item())
    assert ridge.rows == 60


def test_features_and_targets_that_never_vary() -> None:
    x = torch.randn(20, 3)
    x[:, 1] = 1e3
    ridge = Ridge(3)
    ridge.add(x, torch.full((20,), -2.0))
    found = ridge.solve()
    assert (found.weights.abs().max().item(), found.intercept.item()) == pytest.approx((0.0, -2.0))
    assert (found.explained, found.left) == pytest.approx((0.0, 0.0))
    varying = Ridge(3)
    varying.add(x, x[:, 0])
    weights = varying.solve().weights
    assert weights[1] == 0
    assert weights[0] > 0.4
