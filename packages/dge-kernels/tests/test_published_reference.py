"""Outputs of the method's original implementation, recorded on small inputs; data/reference_ops.npz.

The row of a prefix token has no x there, so that column is not compared for such rows.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import dge_kernels as dk

DATA = np.load(Path(__file__).parent / "data" / "reference_ops.npz")
GRIDS = {"h8w8": (8, 8), "h8w12": (8, 12)}


def _load(name: str) -> Tensor:
    return torch.from_numpy(DATA[name])


def _plan(tag: str, device: torch.device) -> dk.QueryPlan:
    return dk.plan_queries(_load(f"{tag}.indices").long().to(device), grid=GRIDS[tag], num_prefix_tokens=2)


@pytest.mark.parametrize("tag", GRIDS)
def test_patches(tag: str, device: torch.device) -> None:
    plan, expected = _plan(tag, device), _load(f"{tag}.patches").int()
    got = plan.patches.cpu()
    spatial = expected[:, 1] >= 0
    assert torch.equal(got[spatial], expected[spatial])
    assert torch.equal(got[:, [0, 1, 3]], expected[:, [0, 1, 3]])
    assert torch.equal(plan.lengths.cpu(), _load(f"{tag}.batch_lengths").int())


@pytest.mark.parametrize("tag", GRIDS)
def test_pool(tag: str, device: torch.device) -> None:
    x = _load(f"{tag}.x").to(device).requires_grad_()
    pooled = dk.pool_queries(x, _plan(tag, device))
    pooled.backward(_load(f"{tag}.compress_grad_out").to(device))
    torch.testing.assert_close(pooled.cpu(), _load(f"{tag}.compress"), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad.cpu(), _load(f"{tag}.compress_grad_x"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tag", GRIDS)
def test_unpool(tag: str, device: torch.device) -> None:
    delta, residual = (_load(f"{tag}.{name}").to(device).requires_grad_() for name in ("y", "ref"))
    plan = _plan(tag, device)
    result = dk.unpool_queries(delta, plan, residual)
    result.backward(_load(f"{tag}.decompress_grad_out").to(device))
    expected = {"decompress_add": result, "decompress_grad_y": delta.grad, "decompress_grad_ref": residual.grad}
    for name, got in expected.items():
        torch.testing.assert_close(got.detach().cpu(), _load(f"{tag}.{name}"), rtol=1e-6, atol=1e-6)
    alone = dk.unpool_queries(delta, plan, torch.zeros_like(residual))
    torch.testing.assert_close(alone.detach().cpu(), _load(f"{tag}.decompress_noadd"), rtol=1e-6, atol=1e-6)


def test_attention(device: torch.device) -> None:
    q = _load("attn.q").transpose(0, 1).to(device).requires_grad_()
    k, v = (_load(f"attn.{name}").permute(1, 2, 0, 3).to(device).requires_grad_() for name in "kv")
    lengths = _load("attn.lengths").int()
    ends = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()]).to(device)
    patches = torch.zeros(len(q), 4, dtype=torch.int32, device=device)
    plan = dk.QueryPlan(patches, ends, (1, 1), 0, (1,), int(lengths.max()))
    out = dk.ragged_attention(q, k, v, plan, scale=float(_load("attn.scale")))
    out.backward(_load("attn.grad_out").transpose(0, 1).to(device))
    torch.testing.assert_close(out.cpu(), _load("attn.out").transpose(0, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(q.grad.cpu(), _load("attn.grad_q").transpose(0, 1), rtol=1e-5, atol=1e-5)
    for tensor, name in ((k, "k"), (v, "v")):
        expected = _load(f"attn.grad_{name}").permute(1, 2, 0, 3)
        torch.testing.assert_close(tensor.grad.cpu(), expected, rtol=1e-5, atol=1e-5)
