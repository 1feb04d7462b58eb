"""A small vision transformer in a folder that timm loads, and drawn pictures for it."""

from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

import dge_models

__all__ = ["draw_pictures", "save_model", "small_vit"]


def small_vit(num_classes: int = 5, name: str = "vit_tiny_patch16_224", **kwargs: object) -> nn.Module:
    """8 x 8 tokens, three blocks, random weights from a fixed seed."""
    torch.manual_seed(0)
    shape = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 3}
    return timm.create_model(name, num_classes=num_classes, **{**shape, **kwargs}).eval()


def save_model(folder: Path, num_classes: int = 5) -> str:
    """Save the small model, and say what timm calls it."""
    dge_models.save_pretrained(small_vit(num_classes), folder)
    return f"local-dir:{folder}"


def draw_pictures(folder: Path, count: int = 12) -> Path:
    """Squares of noise on plain ground, every other one in a folder below."""
    noise = np.random.default_rng(0)
    for number in range(count):
        pixels = np.full((80, 90, 3), noise.integers(0, 255, 3), dtype=np.uint8)
        pixels[10:50, 20:60] = noise.integers(0, 255, (40, 40, 3))
        path = folder / ("below" if number % 2 else "") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder
