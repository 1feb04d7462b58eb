"""DeiT and DGE-DeiT at 256 pixels, registered with timm.

Sources: Touvron et al., "Training data-efficient image transformers", ICML 2021; Song et al., "Dynamic
Grained Encoder for Vision Transformers", NeurIPS 2021 (s124: queries per region side 4, 2 or 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as timm_filter
from torch import Tensor

from dge_models.reference_keys import refuse_misfit, to_timm_keys
from dge_models.registration import create, data_config
from dge_models.vit import DGEVisionTransformer, DGEVisionTransformerDistilled

__all__ = ["checkpoint_filter_fn"]

_WIDTHS = {
    "tiny": {"embed_dim": 192, "num_heads": 3},
    "small": {"embed_dim": 384, "num_heads": 6},
    "base": {"embed_dim": 768, "num_heads": 12},
}


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: VisionTransformer) -> dict[str, Tensor]:
    """Bring pretrained weights to the model's names and sizes, for timm's pretrained loading.

    Args:
        state_dict: In the reference's or timm's layout.
        model: What they are for.

    Returns:
        Weights under timm's names, the position embedding resized bicubically where the grid differs.

    Raises:
        ValueError: The weights are a pyramid's, or their split sets are not the model's.
    """
    refuse_misfit(state_dict, model, "state_dict: doesn't fit")
    filtered: dict[str, Tensor] = timm_filter(to_timm_keys(state_dict), model, antialias=False)
    return filtered


def _create(
    variant: str, size: str, model_class: type[VisionTransformer], pretrained: bool, kwargs: dict[str, Any]
) -> VisionTransformer:
    settings = {"patch_size": 16, "depth": 12, **_WIDTHS[size], **kwargs}
    return create(model_class, variant, pretrained, checkpoint_filter_fn, 3, settings)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return data_config("patch_embed.proj", **kwargs)


default_cfgs = generate_default_cfgs(
    {
        **{f"deit_{size}_patch16_256": _cfg() for size in _WIDTHS},
        **{f"deit_dge_s124_{size}_patch16_256": _cfg() for size in _WIDTHS},
        **{f"deit_dge_s124_{size}_distilled_patch16_256": _cfg(classifier=("head", "head_dist")) for size in _WIDTHS},
    }
)


@register_model
def deit_tiny_patch16_256(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT-Ti: width 192, 3 heads; timm's plain model, to compare with."""
    return _create("deit_tiny_patch16_256", "tiny", VisionTransformer, pretrained, kwargs)


@register_model
def deit_small_patch16_256(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT-S: width 384, 6 heads; timm's plain model, to compare with."""
    return _create("deit_small_patch16_256", "small", VisionTransformer, pretrained, kwargs)


@register_model
def deit_base_patch16_256(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT-B: width 768, 12 heads; timm's plain model, to compare with."""
    return _create("deit_base_patch16_256", "base", VisionTransformer, pretrained, kwargs)


@register_model
def deit_dge_s124_tiny_patch16_256(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT-Ti with Dynamic Grained Encoder blocks."""
    return _create("deit_dge_s124_tiny_patch16_256", "tiny", DGEVisionTransformer, pretrained, kwargs)


@register_model
def deit_dge_s124_small_patch16_256(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT-S with Dynamic Grained Encoder blocks."""
    return _create("deit_dge_s124_small_patch16_256", "small", DGEVisionTransformer, pretrained, kwargs)


@register_model
def deit_dge_s124_base_patch16_256(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT-B with Dynamic Grained Encoder blocks."""
    return _create("deit_dge_s124_base_patch16_256", "base", DGEVisionTransformer, pretrained, kwargs)


@register_model
def deit_dge_s124_tiny_distilled_patch16_256(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Distilled DeiT-Ti with Dynamic Grained Encoder blocks: two prefix tokens, two heads."""
    name = "deit_dge_s124_tiny_distilled_patch16_256"
    return _create(name, "tiny", DGEVisionTransformerDistilled, pretrained, kwargs)


@register_model
def deit_dge_s124_small_distilled_patch16_256(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Distilled DeiT-S with Dynamic Grained Encoder blocks: two prefix tokens, two heads."""
    name = "deit_dge_s124_small_distilled_patch16_256"
    return _create(name, "small", DGEVisionTransformerDistilled, pretrained, kwargs)


@register_model
def deit_dge_s124_base_distilled_patch16_256(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Distilled DeiT-B with Dynamic Grained Encoder blocks: two prefix tokens, two heads."""
    name = "deit_dge_s124_base_distilled_patch16_256"
    return _create(name, "base", DGEVisionTransformerDistilled, pretrained, kwargs)
