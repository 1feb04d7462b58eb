"""Why a model can't be given routed blocks: one reason per kind."""

from __future__ import annotations

from typing import Any

from timm.layers.patch_embed import PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

__all__ = ["reason_against"]

_ROTARY = "rotary position embeddings turn each query by its own place, and a pooled query has several"
_WINDOWS = "its attention is confined to windows, and a query of a routed block sees all tokens of its image"
_RELATIVE = "its attention has a bias per pair of tokens, and a pooled query stands for several"
_PYRAMID = "it is a pyramid with blocks of its own"
_PARALLEL = "its attention and MLP run in parallel, and a routed block has them one after the other"
_CLASSES = {
    "Eva": _ROTARY,
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
    "PyramidVisionTransformer": f"{_PYRAMID}; the routed one is created by name, as pvt_dge_s124_small_256",
    "Cait": "its class token has blocks of its own",
    "Xcit": "its attention is over channels, not over tokens",
    "CrossVit": "it has two streams of tokens",
}
_BLOCKS = {
    "ResPostBlock": "its norms follow attention and MLP, and a routed block has them in front",
    "ParallelScalingBlock": _PARALLEL,
    "ParallelThingsBlock": "it has several attentions in parallel, and a routed block has one",
    "DiffParallelScalingBlock": _PARALLEL,
}


def reason_against(model: nn.Module) -> str | None:
    """What stands against converting a model, None if nothing does that shows before its attentions are looked at.

    Args:
        model: Any module.
    """
    name = type(model).__name__
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        known = _CLASSES.get(name)
        return (
            f"got {name}; expected timm's VisionTransformer or VisionTransformerDistilled"
            f"{f': {known}' if known else ', other classes have blocks of their own'}"
        )
    if type(model.patch_embed) is not PatchEmbed:
        embedding = type(model.patch_embed).__name__
        return (
            f"got a hybrid whose patches come from {embedding}; expected timm's PatchEmbed: the MACs of other "
            "stems are unknown, so no budget could be kept"
        )
    blocks: Any = model.blocks
    for index, block in enumerate(blocks):
        reason = _BLOCKS.get(type(block).__name__)
        if reason is not None:
            return f"blocks.{index} is a {type(block).__name__}; expected timm's Block: {reason}"
    return None
