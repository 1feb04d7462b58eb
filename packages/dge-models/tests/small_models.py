"""Models small enough for tests, routed as trained ones are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import timm
import torch
from torch import nn

from dge_models.routed import routed_blocks

NAMES = sorted(timm.list_models(module=["dge_deit", "dge_dpvt", "dge_pvt"]))
Build = Callable[..., Any]
Model = TypeVar("Model", bound=nn.Module)
SMALL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 7,
}
SMALL_PYRAMID: dict[str, Any] = {
    "img_size": 64,
    "embed_dims": (8, 16, 24, 32),
    "depths": (1, 2, 1, 1),
    "num_heads": (1, 2, 3, 4),
    "mlp_ratios": (2, 2, 2, 2),
    "num_classes": 7,
}


def small_config(name: str) -> dict[str, Any]:
    """Arguments under which the model of this name is small."""
    return SMALL_PYRAMID if "pvt" in name else SMALL


def scatter_routing(model: Model, seed: int = 1) -> Model:
    """Give every router weights under which all splits occur."""
    generator = torch.Generator().manual_seed(seed)
    for block in routed_blocks(model):
        gate = block.router.gate
        with torch.no_grad():
            gate.weight.copy_(torch.randn(gate.weight.shape, generator=generator) * 4)
            gate.bias.copy_(torch.randn(gate.bias.shape, generator=generator) * 0.1)
    return model


def build_small(name: str = "deit_dge_s124_tiny_patch16_256", **kwargs: Any) -> Any:
    """A small model in evaluation mode in which all splits occur."""
    return scatter_routing(timm.create_model(name, **{**small_config(name), **kwargs})).eval()
