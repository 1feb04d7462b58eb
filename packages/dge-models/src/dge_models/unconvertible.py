"""Why a model can't be given routed blocks: one reason per kind."""

from __future__ import annotations

from typing import Any

from timm.layers.patch_embed import PatchEmbed
from torch import nn

from dge_models.families import families, find_family

__all__ = ["reason_against", "reason_against_parts"]

_WINDOWS = "its attention is confined to windows, and a query of a routed block sees all tokens of its image"
_RELATIVE = "its attention has a bias per pair of tokens, and a pooled query stands for several"
_PYRAMID = "it is a pyramid with blocks of its own"
_PARALLEL = "its attention and MLP run in parallel, and a routed block has them one after the other"
_POST_NORM = "its norms follow attention and MLP, and a routed block has them in front"
_CLASSES = {
    "SwinTransformer": _WINDOWS,
    "SwinTransformerV2": _WINDOWS,
    "SwinTransformerV2Cr": _WINDOWS,
    "VisionTransformerSAM": _WINDOWS,
    "Hiera": _WINDOWS,
    "HieraDet": _WINDOWS,
    "TinyVit": _WINDOWS,
    "MaxxVit": _WINDOWS,
    "VisionTransformerRelPos": _RELATIVE,
    "Beit": _RELATIVE,
    "NaFlexVit": "its batches mix images of different token grids, and a routed block has one grid for all",
    "PyramidVisionTransformerV2": _PYRAMID,
    "MultiScaleVit": _PYRAMID,
    "Cait": "its class token has blocks of its own",
    "Xcit": "its attention is over channels, not over tokens",
    "CrossVit": "it has two streams of tokens",
}
_BLOCKS = {
    "ResPostBlock": _POST_NORM,
    "EvaBlockPostNorm": _POST_NORM,
    "ParallelScalingBlock": _PARALLEL,
    "ParallelThingsBlock": "it has several attentions in parallel, and a routed block has one",
    "DiffParallelScalingBlock": _PARALLEL,
}


def reason_against(model: nn.Module) -> str | None:
    """What stands against converting a model, None if nothing does that shows before its attentions are looked at.

    Args:
        model: Any module.
    """
    family, name = find_family(model), type(model).__name__
    if "forward" in vars(model):
        return f"got a {name} whose forward is replaced, as offloading does; convert first and offload afterwards"
    if family is not None and type(model) in family.converts:
        return family.reason_against(model)
    *most, last = [plain.__name__ for known in families() for plain in known.converts]
    got = f"got {name}; expected timm's {', '.join(most)} or {last}"
    reason = _CLASSES.get(name) or (family and family.reason_against(model))
    return f"{got}: {reason}" if reason else f"{got}, other classes have blocks of their own"


def reason_against_parts(model: Any) -> str | None:
    """What stands against converting a transformer on one token grid, from its stem and its blocks."""
    if type(model.patch_embed) is not PatchEmbed:
        embedding = type(model.patch_embed).__name__
        return (
            f"got a hybrid whose patches come from {embedding}; expected timm's PatchEmbed: the MACs of other "
            "stems are unknown, so no budget could be kept"
        )
    for index, block in enumerate(model.blocks):
        reason = _BLOCKS.get(type(block).__name__)
        if reason is not None:
            return f"blocks.{index} is a {type(block).__name__}; expected timm's Block: {reason}"
    return None
