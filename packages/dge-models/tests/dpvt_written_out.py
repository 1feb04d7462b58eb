"""DPVT in plain functions, from the published description, on the reference's own names of its parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

HEADS, PATCHES, POINTS = (1, 2, 5, 8), (4, 2, 2, 2), 4


def bilinear(values: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Samples of [B, h, d, H, W] at [B, h, N, P]: [B, h, d, N, P], zero outside."""
    rows, cols = values.shape[-2:]
    places = torch.stack([(2 * x + 1) / cols - 1, (2 * y + 1) / rows - 1], dim=-1)
    sampled = F.grid_sample(values.flatten(0, 1), places.flatten(0, 1), align_corners=False)
    return sampled.unflatten(0, values.shape[:2])


def _linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _norm(weights: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def attention(
    weights: dict[str, Tensor], name: str, z: Tensor, grid: tuple[int, int], heads: int, offset_gradient: float = 1.0
) -> Tensor:
    """What attention adds to normalised tokens [B, N, C]."""
    batch, tokens, width = z.shape
    values = _linear(weights, f"{name}.v", z).transpose(1, 2).reshape(batch, heads, width // heads, *grid)
    offsets = _linear(weights, f"{name}.offsets", z).view(batch, tokens, heads, POINTS, 2)
    offsets = offsets_with(offsets, offset_gradient)
    shares = _linear(weights, f"{name}.attn_weight", z).view(batch, tokens, heads, POINTS).softmax(-1)
    place = torch.arange(tokens).view(1, -1, 1, 1)
    x, y = place % grid[1] + offsets[..., 0], place // grid[1] + offsets[..., 1]
    sampled = bilinear(values, x.transpose(1, 2), y.transpose(1, 2))
    mixed = (sampled * shares.transpose(1, 2).unsqueeze(2)).sum(-1)
    return _linear(weights, f"{name}.proj", mixed.flatten(1, 2).transpose(1, 2))


def offsets_with(offsets: Tensor, factor: float) -> Tensor:
    """The offsets themselves, their gradient multiplied."""
    if factor != 1.0:
        offsets.register_hook(lambda gradient: gradient * factor)
    return offsets


def dpvt(weights: dict[str, Tensor], images: Tensor, made_for: int = 256, offset_gradient: float = 1.0) -> Tensor:
    """Logits [B, classes] of images [B, 3, H, W]."""
    x, side = images, made_for
    for stage, (patch, heads) in enumerate(zip(PATCHES, HEADS, strict=True), 1):
        side //= patch
        convolution = (weights[f"patch_embed{stage}.proj.weight"], weights[f"patch_embed{stage}.proj.bias"])
        x = F.conv2d(x, *convolution, stride=patch)
        grid = (x.shape[2], x.shape[3])
        x = _norm(weights, f"patch_embed{stage}.norm", x.flatten(2).transpose(1, 2), 1e-5)
        positions = weights[f"pos_embed{stage}"].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        if grid != (side, side):
            positions = F.interpolate(positions, grid, mode="bilinear", align_corners=False)
        x = x + positions.flatten(2).transpose(1, 2)
        depth = sum(key.startswith(f"block{stage}.") and key.endswith("norm1.weight") for key in weights)
        for name in (f"block{stage}.{index}" for index in range(depth)):
            z = _norm(weights, f"{name}.norm1", x, 1e-6)
            x = x + attention(weights, f"{name}.attn", z, grid, heads, offset_gradient)
            hidden = F.gelu(_linear(weights, f"{name}.mlp.fc1", _norm(weights, f"{name}.norm2", x, 1e-6)))
            x = x + _linear(weights, f"{name}.mlp.fc2", hidden)
        if stage < len(PATCHES):
            x = x.transpose(1, 2).unflatten(2, grid)
    return _linear(weights, "head", _norm(weights, "norm", x, 1e-6).mean(1))
