import pytest
import torch
from cases import CASES, Case

import dge_kernels as dk
from dge_kernels import reference


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_reference(case: Case, device: torch.device, dtype: torch.dtype) -> None:
    x = case.tokens(device, dtype)
    weight = torch.randn(len(case.splits), case.channels).to(device, dtype)
    bias = 0.1 * torch.randn(len(case.splits)).to(device, dtype)
    arguments = {"grid": case.grid, "splits": case.splits, "num_prefix_tokens": case.prefix}
    choice = dk.route(x, weight, bias, **arguments)
    assert choice.dtype == torch.uint8
    assert torch.equal(choice, reference.route(x, weight, bias, **arguments))
    assert torch.equal(
        dk.route(x, weight, **arguments), reference.route(x, weight, torch.zeros_like(bias), **arguments)
    )


def test_prefix_tokens_are_not_seen(device: torch.device) -> None:
    case = Case((8, 8), prefix=2)
    x, weight = case.tokens(device), torch.randn(3, case.channels, device=device)
    changed = x.clone()
    changed[:, :2] = 1e6
    first, second = (dk.route(t, weight, grid=(8, 8), num_prefix_tokens=2) for t in (x, changed))
    assert torch.equal(first, second)


def test_the_first_of_equals_wins(device: torch.device) -> None:
    x = torch.ones(1, 16, 5, device=device)
    assert dk.route(x, torch.ones(3, 5, device=device), grid=(4, 4)).item() == 0


def test_nan_counts_as_largest(device: torch.device) -> None:
    x = torch.ones(1, 16, 1, device=device)
    weight = torch.tensor([[5.0], [float("nan")], [float("inf")]], device=device)
    assert dk.route(x, weight, grid=(4, 4)).item() == 1


def test_many_splits(device: torch.device) -> None:
    splits = tuple(k for k in range(1, 121) if 120 % k == 0)
    x, weight = torch.randn(2, 130, 16, device=device), torch.randn(len(splits), 16, device=device)
    arguments = {"grid": (1, 130), "splits": splits}
    assert torch.equal(dk.route(x, weight, **arguments), reference.route(x, weight, **arguments))


def test_no_gradient_flows() -> None:
    x, weight = torch.randn(1, 16, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    assert not dk.route(x, weight, grid=(4, 4)).requires_grad


def test_strided_tokens(device: torch.device) -> None:
    x, weight = torch.randn(2, 8, 16, device=device).transpose(1, 2), torch.randn(3, 8, device=device)
    assert torch.equal(dk.route(x, weight, grid=(4, 4)), dk.route(x.contiguous(), weight, grid=(4, 4)))
