"""Conversion of timm's vision transformers: the same function until it is trained."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, cast

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from dge_models.encoder import DropPathMode, TrainingMode
from dge_models.reference_keys import accept_reference_keys
from dge_models.unconvertible import reason_against
from dge_models.vit import (
    DGEVisionTransformer,
    DGEVisionTransformerDistilled,
    route_blocks,
    routed_blocks,
)

__all__ = ["from_timm"]

_CLASSES: dict[type[nn.Module], type[DGEVisionTransformer] | type[DGEVisionTransformerDistilled]] = {
    VisionTransformer: DGEVisionTransformer,
    VisionTransformerDistilled: DGEVisionTransformerDistilled,
}


def from_timm(
    model: nn.Module,
    splits: tuple[int, ...] = (4, 2, 1),
    layers: Iterable[int] | None = None,
    *,
    training_mode: TrainingMode = "dense",
    drop_path_mode: DropPathMode = "image",
) -> DGEVisionTransformer | DGEVisionTransformerDistilled:
    """Give a timm vision transformer routed blocks.

    The result is a copy with all of the model's weights under their names, and a router in each chosen
    block. Every router starts with zero weights and a bias for the finest split, so that in evaluation the
    result computes what `model` computes, whatever the scale of its tokens, until it is trained. (Small
    random weights, as a model from scratch gets, would not promise that for tokens of large norm.)

    Args:
        model: timm's ``VisionTransformer`` or ``VisionTransformerDistilled``: DeiT, DeiT III, AugReg ViT,
            CLIP and SigLIP towers, DINOv2, with or without class token, registers, layer scale, norms of
            queries and keys or gated MLPs. It is left as it is.
        splits: Queries per region side, finest first; the first is the region's side in tokens.
        layers: Indices of the blocks that route, negative ones from the end; None means all.
        training_mode: "dense" or "sparse", see :class:`DGEBlock`.
        drop_path_mode: What drop path drops, "image" as timm does or "query" as the method's authors do.

    Returns:
        The converted copy, in the training or evaluation mode of `model`.

    Raises:
        ValueError: The model is converted already, or has something that can't be routed; the error says
            what.
    """
    if routed_blocks(model):
        raise ValueError(f"model: {type(model).__name__} is converted already; expected a plain timm model")
    reason = reason_against(model)
    if reason is not None:
        raise ValueError(f"model: {reason}")
    converted: Any = copy.deepcopy(model)
    route_blocks(converted, splits=splits, layers=layers, training_mode=training_mode, drop_path_mode=drop_path_mode)
    with torch.no_grad():
        for block in routed_blocks(converted):
            block.router.gate.weight.zero_()
    converted.__class__ = _CLASSES[type(model)]
    accept_reference_keys(converted)
    return cast(DGEVisionTransformer | DGEVisionTransformerDistilled, converted)
