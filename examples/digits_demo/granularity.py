"""Where the dynamic model spends its queries: a picture, and the shares on ink and on plain ground."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, default_collate

import dge_models
from dge_recipes.errors import UserError
from dge_recipes.evaluation import first_images
from dge_recipes.models import RoutedModel

__all__ = ["draw_digits", "fine_shares", "regions_with_ink"]

_INK = 0.0  # half-way between ground (-1) and full ink (1)


def fine_shares(model: RoutedModel, data_set: Dataset[Any]) -> dict[str, float]:
    """Share of the regions at the finest split, over all layers and held-out images.

    Args:
        model: the dynamic model.
        data_set: held-out digits.

    Returns:
        ``ink``: among regions with a pixel that is more ink than ground; ``ground``: among the others.
    """
    images = first_images(data_set, len(data_set))  # type: ignore[arg-type]  # has __len__
    device = next(model.parameters()).device
    traced = dge_models.trace(model, images.to(device))
    fine = torch.stack(traced.granularity).cpu() == 0
    ink = regions_with_ink(images, (fine.shape[2], fine.shape[3])).expand_as(fine)
    return {"ink": fine[ink].float().mean().item(), "ground": fine[~ink].float().mean().item()}


def regions_with_ink(images: Tensor, regions: tuple[int, int]) -> Tensor:
    """Which regions hold ink.

    Args:
        images: [B, 1, H, W] in [-1, 1], the ground at -1.
        regions: (Hr, Wr), regions per column and row of the image.

    Returns:
        bool [B, Hr, Wr].
    """
    return F.adaptive_max_pool2d(images, regions)[:, 0] > _INK


def draw_digits(model: RoutedModel, data_set: Dataset[Any], path: Path) -> None:
    """Draw the first held-out digit of each class with its splits in every layer.

    Args:
        model: the dynamic model.
        data_set: held-out digits.
        path: the PNG to write.

    Raises:
        UserError: it cannot be written.
    """
    images, labels = default_collate([data_set[index] for index in range(len(data_set))])  # type: ignore[arg-type]
    chosen = [int((labels == label).nonzero()[0]) for label in labels.unique()]
    shown = images[chosen]
    device = next(model.parameters()).device
    traced = dge_models.trace(model, shown.to(device))
    guesses = traced.logits.argmax(1).tolist()
    shares = (traced.macs / traced.static_macs).tolist()
    captions = [
        f"{label}, read as {guess}: {share:.0%} of the dense MACs"
        for label, guess, share in zip(labels[chosen].tolist(), guesses, shares, strict=True)
    ]
    picture = dge_models.draw_trace(list((shown + 1) / 2), traced, captions=captions)
    try:
        picture.save(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
