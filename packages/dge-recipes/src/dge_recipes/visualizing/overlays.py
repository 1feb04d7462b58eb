"""One picture per image: the image, its splits in every layer, and their mean."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

import dge_models
from dge_models import Router
from dge_recipes.config import Config
from dge_recipes.errors import UserError
from dge_recipes.models import RoutedModel
from dge_recipes.visualizing.images import prepare

__all__ = ["Overlay", "draw_overlays"]


@dataclass(frozen=True)
class Overlay:
    """What became of one image.

    Attributes:
        source: its file.
        picture: the drawing.
        share: the image's MACs over those with every query.
        guess: the likeliest class.
        confidence: its probability.
    """

    source: Path
    picture: Image.Image
    share: float
    guess: int
    confidence: float

    @property
    def caption(self) -> str:
        """In words."""
        return f"{self.source.name}: {self.share:.0%} of the dense MACs, class {self.guess} at {self.confidence:.0%}"


def draw_overlays(
    model: RoutedModel, paths: Sequence[Path], config: Config, layers: Sequence[int] | None = None
) -> list[Overlay]:
    """Draw how a model routes images.

    Args:
        model: with routers.
        paths: image files.
        config: whose evaluation the images are prepared as.
        layers: indices, from 0, of routed layers to draw; None: all.

    Raises:
        UserError: a file that is no image, or a layer that does not exist.
    """
    device = next(model.parameters()).device
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for layer in layers or ():
        if not 0 <= layer < len(routers):
            raise UserError(f"got layer {layer + 1}, expected 1 to {len(routers)}: those with routers")
    splits = routers[0].splits
    overlays = []
    for path in paths:
        tensor, shown = prepare(path, config)
        traced = dge_models.trace(model, tensor[None].to(device))
        probabilities = traced.logits[0].float().softmax(0)
        share = float(traced.macs[0] / traced.static_macs)
        guess = int(probabilities.argmax())
        confidence = float(probabilities[guess])
        caption = f"{share:.0%} of the dense MACs"
        picture = dge_models.draw_trace(torch.stack([shown]), traced, splits, layers=layers, captions=[caption])
        overlays.append(Overlay(path, picture, share, guess, confidence))
    return overlays
