"""Attention whose queries follow a quadtree: one for a flat block of 8 x 8 tokens, up to 64 where there is detail.

No router and nothing learned decides here: the variance of a block does. It is not the method that dge-kernels was
written for, and needs none of its models.

Run it: python quadtree_attention.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dge_kernels as dk

SPLITS = (8, 4, 2, 1)


def detail_to_choice(features: Tensor, thresholds: tuple[float, float, float]) -> Tensor:
    """Index into SPLITS for each 8 x 8 block of features [B, C, H, W], finest where their variance is largest."""
    mean = nn.functional.avg_pool2d(features, 8, ceil_mode=True, count_include_pad=False)
    square = nn.functional.avg_pool2d(features.square(), 8, ceil_mode=True, count_include_pad=False)
    variance = (square - mean.square()).mean(1)
    return (variance.unsqueeze(-1) < variance.new_tensor(thresholds)).sum(-1)


class QuadtreeAttention(nn.Module):
    """Self-attention over a feature map [B, C, H, W] with as many queries as its detail asks for."""

    def __init__(self, channels: int, heads: int, thresholds: tuple[float, float, float] = (0.6, 0.2, 0.05)) -> None:
        super().__init__()
        self.heads, self.thresholds = heads, thresholds
        self.norm = nn.LayerNorm(channels)
        self.q, self.kv = nn.Linear(channels, channels), nn.Linear(channels, 2 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, features: Tensor) -> tuple[Tensor, dk.QueryPlan]:
        """The features with what their queries learned added, and the plan of those queries."""
        grid = (features.shape[2], features.shape[3])
        plan = dk.plan_queries(detail_to_choice(features, self.thresholds), SPLITS, grid=grid)
        tokens = features.flatten(2).transpose(1, 2)
        q = self.q(self.norm(dk.pool_queries(tokens, plan))).unflatten(-1, (self.heads, -1))
        k, v = self.kv(self.norm(tokens)).unflatten(-1, (2, self.heads, -1)).unbind(2)
        update = self.out(dk.ragged_attention(q, k, v, plan).flatten(1))
        tokens = dk.unpool_queries(update, plan, tokens)
        return tokens.transpose(1, 2).unflatten(2, grid), plan


def main() -> None:
    """Attend over a map whose left half is flat and whose right half is not, forward and backward."""
    torch.manual_seed(0)
    features = torch.zeros(2, 32, 24, 40)
    features[:, :, :, 20:] = torch.randn(2, 32, 24, 20)
    layer = QuadtreeAttention(32, heads=4)
    out, plan = layer(features)
    out.square().mean().backward()
    dense = 24 * 40
    print(f"{plan.lengths.tolist()} queries of {dense} per image; gradient norm {layer.q.weight.grad.norm():.2e}")
    if not all(0 < length < dense for length in plan.lengths.tolist()):
        raise SystemExit("the quadtree is neither flat nor full")


if __name__ == "__main__":
    main()
