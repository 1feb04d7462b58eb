"""Small backbones, heads and batches of dense prediction."""

from typing import Any

import torch
from torch import Tensor, nn

from dge_recipes.config import ModelConfig
from dge_recipes.config.head import HeadConfig
from dge_recipes.config.schema import ConvertConfig
from dge_recipes.dense import build_detector, build_segmenter, create_backbone

__all__ = ["NARROW", "boxes", "detector", "pyramid", "scattered", "segmenter", "vit"]

NARROW: dict[str, Any] = {
    "img_size": 64,
    "embed_dims": [8, 16, 16, 32],
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 2, 2, 4],
    "mlp_ratios": [2, 2, 2, 2],
    "class_token": False,
    "global_pool": "avg",
}
_VIT: dict[str, Any] = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}


def pyramid(routed: bool = True, **model: Any) -> nn.Module:
    """Four narrow stages of one block, strides 4 to 32."""
    torch.manual_seed(0)
    name = "pvt_dge_s124_tiny_256" if routed else "pvt_tiny_256"
    return create_backbone(ModelConfig(name=name, kwargs=NARROW, **model))


def vit(routed: bool = True, **kwargs: Any) -> nn.Module:
    """Two narrow blocks on patches of 16 pixels, for images of any size."""
    torch.manual_seed(0)
    kwargs = {**_VIT, "dynamic_img_size": True, **kwargs}
    convert = ConvertConfig() if routed else None
    return create_backbone(ModelConfig(name="vit_tiny_patch16_224", kwargs=kwargs, convert=convert))


def detector(kind: str, backbone: nn.Module | None = None, **head: Any) -> Any:
    """Of three classes, at 64 pixels."""
    return build_detector(backbone or pyramid(), HeadConfig(kind=kind, **{"channels": 32, **head}), 3, 64)


def segmenter(kind: str = "semantic_fpn", backbone: nn.Module | None = None, **head: Any) -> Any:
    """Of three classes."""
    return build_segmenter(backbone or pyramid(), HeadConfig(kind=kind, **{"channels": 64, **head}), 3)


def boxes(count: int = 1, size: int = 64) -> dict[str, Tensor]:
    """Targets of an image with so many objects in it."""
    masks = torch.zeros(count, size, size, dtype=torch.uint8)
    masks[:, 10:40, 8:44] = 1
    box = torch.tensor([[8.0, 10.0, 44.0, 40.0]]).expand(count, 4)
    return {"boxes": box, "labels": torch.arange(count) % 3 + 1, "masks": masks}


def scattered(network: Any) -> Any:
    """The network, with routers under which all splits occur; fresh ones choose the finest everywhere."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in network.named_parameters():
        if ".router." in name:
            spread = 4 if parameter.ndim > 1 else 0.1
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return network
