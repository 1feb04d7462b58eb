"""Conversion of timm's vision transformers: the same function until it is trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from dge_models.encoder import DropPathMode, TrainingMode
from dge_models.families import family_of
from dge_models.projections import copied
from dge_models.recorded_arguments import record_base
from dge_models.reference_keys import accept_reference_keys
from dge_models.routed import RoutedTransformer, route_blocks, routed_blocks
from dge_models.unconvertible import reason_against

__all__ = ["from_timm"]


def from_timm(
    model: nn.Module,
    splits: tuple[int, ...] = (4, 2, 1),
    layers: Iterable[int] | None = None,
    *,
    training_mode: TrainingMode = "dense",
    drop_path_mode: DropPathMode = "image",
) -> RoutedTransformer:
    """Give a timm vision transformer routed blocks.

    The result is a copy with all of the model's weights under their names, and a router in each chosen
    block. Every router starts with zero weights and a bias for the finest split, so that in evaluation the
    result computes what `model` computes, whatever the scale of its tokens, until it is trained. (Small
    random weights, as a model from scratch gets, would not promise that for tokens of large norm.)

    Of a model from ``timm.create_model`` the result knows its name (``base_architecture``), and its
    ``pretrained_cfg`` names :func:`~dge_models.dge_vit`, so that :func:`save_pretrained` can save it.

    Args:
        model: timm's ``VisionTransformer`` or ``VisionTransformerDistilled``: DeiT, DeiT III, AugReg ViT,
            CLIP and SigLIP towers, DINOv2, with or without class token, registers, layer scale, norms of
            queries and keys or gated MLPs; or its ``Eva``: EVA-02, DINOv3, Perception Encoder and other ViTs with
            rotary embeddings. Its linear layers may be changed already (adapters, int8, pruning). It is left as it is.
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
    converted: Any = copied(model)
    route_blocks(converted, splits=splits, layers=layers, training_mode=training_mode, drop_path_mode=drop_path_mode)
    with torch.no_grad():
        for block in routed_blocks(converted):
            block.router.gate.weight.zero_()
    converted.__class__ = family_of(model).converts[type(model)]
    record_base(converted)
    accept_reference_keys(converted)
    return cast(RoutedTransformer, converted)
