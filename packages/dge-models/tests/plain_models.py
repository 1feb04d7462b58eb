"""Plain models small enough for tests, and pictures that are plain in part."""

from __future__ import annotations

from typing import Any

import timm
import torch

TINY: dict[str, Any] = {"img_size": 96, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
PLAIN_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "token": ("deit_tiny_patch16_224", TINY),
    "distilled": ("deit_tiny_distilled_patch16_224", TINY),
    "average": ("vit_base_patch16_siglip_gap_224", TINY),
    "map": ("vit_base_patch16_siglip_224", TINY),
    "registers": ("vit_small_patch14_reg4_dinov2", {**TINY, "img_size": 98, "patch_size": 14}),
    "qk_norm": ("vit_tiny_patch16_224", {**TINY, "qk_norm": True, "img_size": 72}),
    "no_head": ("vit_small_patch14_dinov2", {**TINY, "img_size": 98, "patch_size": 14, "num_classes": 0}),
}


def stirred(model: Any) -> Any:
    """A model in evaluation mode whose random weights, biases and layer scales are large enough to matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def build_plain(case: str = "token", **kwargs: Any) -> Any:
    """One of these models, stirred; the same weights every time."""
    name, settings = PLAIN_MODELS[case]
    torch.manual_seed(0)
    return stirred(timm.create_model(name, **{**settings, **kwargs}))


def partly_plain_images(case: str = "token", batch: int = 6, seed: int = 1) -> torch.Tensor:
    """Pictures that are plain in part, each to another share."""
    size = PLAIN_MODELS[case][1]["img_size"]
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, size, size, generator=generator)
    for index in range(batch):
        images[index, :, : size * index // batch] = 0.3
    return images
