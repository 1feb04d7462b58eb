"""The Pyramid Vision Transformer and DGE-PVT at 256 pixels, registered with timm.

Sources: Wang et al., "Pyramid Vision Transformer", ICCV 2021; Song et al., "Dynamic Grained Encoder for Vision
Transformers", NeurIPS 2021 (s124: queries per region side 4, 2 or 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from dge_models.pvt import DGEPyramidVisionTransformer, PyramidVisionTransformer
from dge_models.pvt_stage import fit_positions
from dge_models.reference_keys import refuse_misfit, to_timm_keys
from dge_models.registration import create, data_config

__all__ = ["checkpoint_filter_fn"]

_DEPTHS = {
    "tiny": (2, 2, 2, 2),
    "small": (3, 4, 6, 3),
    "medium": (3, 4, 18, 3),
    "large": (3, 8, 27, 3),
}


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Bring pretrained weights to the model's names and sizes, for timm's pretrained loading.

    Args:
        state_dict: In the reference's or this package's layout.
        model: What they are for; as a backbone it may have fewer stages or no class token.

    Returns:
        Weights under the model's names, position embeddings resized bilinearly where the grid differs.

    Raises:
        ValueError: The weights are of another kind of model, or their split sets are not the model's.
    """
    refuse_misfit(state_dict, model, "state_dict: doesn't fit")
    return fit_positions(to_timm_keys(state_dict), model)


def _create(
    variant: str, size: str, model_class: type[PyramidVisionTransformer], pretrained: bool, kwargs: dict[str, Any]
) -> PyramidVisionTransformer:
    settings = {"depths": _DEPTHS[size], **kwargs}
    return create(model_class, variant, pretrained, checkpoint_filter_fn, (0, 1, 2, 3), settings)


def _cfg() -> dict[str, Any]:
    return data_config(
        "stages.0.patch_embed.proj", min_input_size=(3, 32, 32), pool_size=(8, 8), fixed_input_size=False
    )


default_cfgs = generate_default_cfgs(
    {
        **{f"pvt_{size}_256": _cfg() for size in _DEPTHS},
        **{f"pvt_dge_s124_{size}_256": _cfg() for size in _DEPTHS},
    }
)


@register_model
def pvt_tiny_256(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """PVT-Tiny: depths 2, 2, 2, 2; the plain model, to compare with."""
    return _create("pvt_tiny_256", "tiny", PyramidVisionTransformer, pretrained, kwargs)


@register_model
def pvt_small_256(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """PVT-Small: depths 3, 4, 6, 3; the plain model, to compare with."""
    return _create("pvt_small_256", "small", PyramidVisionTransformer, pretrained, kwargs)


@register_model
def pvt_medium_256(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """PVT-Medium: depths 3, 4, 18, 3; the plain model, to compare with."""
    return _create("pvt_medium_256", "medium", PyramidVisionTransformer, pretrained, kwargs)


@register_model
def pvt_large_256(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """PVT-Large: depths 3, 8, 27, 3; the plain model, to compare with."""
    return _create("pvt_large_256", "large", PyramidVisionTransformer, pretrained, kwargs)


@register_model
def pvt_dge_s124_tiny_256(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """PVT-Tiny with Dynamic Grained Encoder blocks."""
    return _create("pvt_dge_s124_tiny_256", "tiny", DGEPyramidVisionTransformer, pretrained, kwargs)


@register_model
def pvt_dge_s124_small_256(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """PVT-Small with Dynamic Grained Encoder blocks."""
    return _create("pvt_dge_s124_small_256", "small", DGEPyramidVisionTransformer, pretrained, kwargs)


@register_model
def pvt_dge_s124_medium_256(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """PVT-Medium with Dynamic Grained Encoder blocks."""
    return _create("pvt_dge_s124_medium_256", "medium", DGEPyramidVisionTransformer, pretrained, kwargs)


@register_model
def pvt_dge_s124_large_256(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """PVT-Large with Dynamic Grained Encoder blocks."""
    return _create("pvt_dge_s124_large_256", "large", DGEPyramidVisionTransformer, pretrained, kwargs)
