"""A small run of every CUDA kernel, forward and backward, for compute-sanitizer to watch."""

from __future__ import annotations

import torch

import dge_kernels as dk


def run(dtype: torch.dtype, grid: tuple[int, int], channels: int) -> None:
    """One block on a grid, with heads of 16 channels where they divide, else of one."""
    rows, cols = -(-grid[0] // 4), -(-grid[1] // 4)
    width = 16 if channels % 16 == 0 else 1
    x = torch.randn(2, 1 + grid[0] * grid[1], channels, device="cuda", dtype=dtype, requires_grad=True)
    dk.route(x, torch.randn(3, channels, device="cuda"), grid=grid, num_prefix_tokens=1)
    plan = dk.plan_queries(torch.randint(0, 3, (2, rows, cols), device="cuda"), grid=grid, num_prefix_tokens=1)
    queries = dk.pool_queries(x, plan).unflatten(-1, (-1, width))
    keys = x.unflatten(-1, (-1, width))
    # The package's own attention kernels, also where torch's would be taken.
    out, _ = torch.ops.dge_kernels.ragged_attention(queries, keys, keys, plan.cu_seqlens, plan.max_seqlen, 0.25)
    dk.unpool_queries(out.flatten(1), plan, x).float().square().sum().backward()
    # Packed keys, of which the last image has none, and a bias per key.
    keys = keys.detach().flatten(0, 1).requires_grad_()
    ends = torch.tensor([0, len(keys), len(keys)], device="cuda").int()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    bias = torch.randn(keys.shape[:2], device="cuda", dtype=wide)
    packed = (plan.cu_seqlens, plan.max_seqlen, 0.25, ends, bias.requires_grad_())
    torch.ops.dge_kernels.ragged_attention(queries.detach(), keys, keys, *packed)[0].float().square().sum().backward()
    torch.cuda.synchronize()


def main() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        run(dtype, (8, 8), 32)
        run(dtype, (5, 7), 13)
    print("every kernel ran")


if __name__ == "__main__":
    main()
