"""Problems to try the operators on, and the closeness that each dtype allows."""

from dataclasses import dataclass

import torch
from torch import Tensor

import dge_kernels as dk

# The largest error, in units of the largest expected entry: a few roundings of the dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Case:
    """A grid and a split set."""

    grid: tuple[int, int]
    prefix: int = 1
    splits: tuple[int, ...] = (4, 2, 1)
    batch: int = 3
    channels: int = 40

    def regions(self) -> tuple[int, int]:
        size = max(self.splits)
        return -(-self.grid[0] // size), -(-self.grid[1] // size)

    def choice(self, device: torch.device | str = "cpu") -> Tensor:
        return torch.randint(0, len(self.splits), (self.batch, *self.regions())).to(device)

    def plan(self, device: torch.device | str = "cpu") -> dk.QueryPlan:
        return dk.plan_queries(self.choice(device), self.splits, grid=self.grid, num_prefix_tokens=self.prefix)

    def tokens(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        count = self.prefix + self.grid[0] * self.grid[1]
        return torch.randn(self.batch, count, self.channels).to(device, dtype)


CASES = {
    "whole": Case((8, 12)),
    "clipped": Case((7, 9), prefix=2),
    "tiny": Case((1, 1), prefix=0),
    "row": Case((1, 13), prefix=0, batch=1),
    "coarse-only": Case((5, 5), splits=(1,)),
    "deep": Case((11, 16), splits=(8, 4, 2, 1), channels=33),
    "unordered": Case((6, 6), splits=(1, 2), channels=8),
    "one-channel": Case((4, 4), channels=1),
    "many-channels": Case((4, 4), channels=1030, batch=2),
    "no-images": Case((4, 4), batch=0),
}


def wide(*tensors: Tensor) -> list[Tensor]:
    """float64 leaves with the same values, for the reference to work on."""
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def assert_close(actual: Tensor, expected: Tensor, slack: float = 1.0) -> None:
    """Close to a float64 result of inputs of order one, as far as the actual dtype allows.

    The error is measured in units of the largest expected entry, or of one where that is smaller: what is
    left of sums that cancel is rounding.
    """
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if actual.numel() == 0:
        return
    exact = expected.detach().double()
    unit = max(1.0, float(exact.abs().max()))
    difference = float((actual.detach().double() - exact).abs().max())
    assert difference <= slack * TOLERANCE[actual.dtype] * unit, f"off by {difference:.2e} of {unit:.2e}"
