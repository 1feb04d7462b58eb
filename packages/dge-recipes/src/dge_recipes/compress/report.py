"""What was found, as a table and as JSON, and a picture of where the chosen model spends its work."""

import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

import dge_models
import dge_recipes
from dge_recipes import markdown
from dge_recipes.compress.choice import Result
from dge_recipes.compress.methods import Attempt
from dge_recipes.data.section import ImageData
from dge_recipes.evaluation.speed import device_facts
from dge_recipes.models import is_routed

__all__ = ["compress_table", "draw_work", "machine"]


def compress_table(results: Sequence[Result], attempts: Sequence[Attempt], *, class_token: bool) -> str:
    """One line per method, in Markdown, and below it the methods that gave no model.

    Args:
        results: in the order of the lines, the dense model's first.
        attempts: of all methods.
        class_token: the first cosine is that of the class token, else that of the pooled features.
    """
    what = "class" if class_token else "pooled"
    names = f"{what} cosine", "token cosine", "agreement", "images/s", "against dense", "implied"
    rows = []
    for each in results:
        found = each.fidelity
        agreement = "" if found.agreement is None else f"{found.agreement:.1%}"
        kept = f"{found.mac_ratio:.3f}", f"{found.class_cosine:.4f}", f"{found.token_cosine:.4f}", agreement
        speed = f"{each.images_per_second:.1f}", f"{each.against_dense:.2f}x", f"{each.implied:.2f}x"
        rows.append((each.method, *kept, *speed))
    missing = [f"\n{each.method}: no model: {each.reason}" for each in attempts if each.model is None]
    return "\n".join([markdown.table(("method", "MAC ratio", *names), rows), *missing])


def draw_work(model: nn.Module, images: Tensor, section: ImageData) -> Image.Image:
    """Draw which parts of pictures get much and which little.

    Args:
        model: cheaper, on the images' device.
        images: [B, 3, H, W], normalised.
        section: says how.
    """
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (section.mean, section.std))
    shown = [(image.cpu() * std + mean).clamp(0, 1) for image in images]
    traced = dge_models.trace(model, images)
    if is_routed(model):
        splits = next(module for module in model.modules() if isinstance(module, dge_models.Router)).splits
        return dge_models.draw_trace(shown, traced, splits)
    return dge_models.draw_trace(shown, traced)


def machine(device: torch.device) -> dict[str, Any]:
    """What it was measured on, and with which versions."""
    return {
        **device_facts(device),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "timm")},
        "dge_models": dge_models.__version__,
        "dge_recipes": dge_recipes.__version__,
    }
