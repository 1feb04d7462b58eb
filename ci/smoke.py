"""What an installed dge-kernels must do anywhere: a forward and a backward, and honest build facts.

Usage: python smoke.py [expected key=value of the build facts ...], such as cuda_loaded=False.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import dge_kernels as dk


def step() -> None:
    """One attention block, forward and backward, against the reference."""
    torch.manual_seed(0)
    choice = torch.randint(0, 3, (2, 3, 3))
    x = torch.randn(2, 1 + 9 * 11, 64, requires_grad=True)
    results = []
    for ops in (dk, dk.reference):
        plan = ops.plan_queries(choice, (4, 2, 1), grid=(9, 11), num_prefix_tokens=1)
        keys = x.unflatten(-1, (4, 16))
        queries = ops.pool_queries(x, plan).unflatten(-1, (4, 16))
        y = ops.unpool_queries(ops.ragged_attention(queries, keys, keys, plan).flatten(1), plan, x)
        results.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
    for fast, exact in zip(*results, strict=True):
        torch.testing.assert_close(fast, exact, rtol=1e-4, atol=1e-4)


def main() -> None:
    step()
    facts = dk.build_info()
    print(f"dge-kernels {facts['version']} in {Path(dk.__file__).parent}, torch {facts['torch']}: ok")
    print(f"CUDA: {'loaded' if facts['cuda_loaded'] else facts['cuda_reason']}")
    for argument in sys.argv[1:]:
        name, value = argument.split("=", 1)
        if value not in str(facts[name]):  # type: ignore[literal-required]
            raise SystemExit(f"{name} is {facts[name]!r}, not {value!r}")  # type: ignore[literal-required]


if __name__ == "__main__":
    main()
