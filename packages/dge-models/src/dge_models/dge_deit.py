"""DeiT and DGE-DeiT at 256 pixels, registered with timm.

Sources: Touvron et al., "Training data-efficient image transformers", ICML 2021; Song et al., "Dynamic
Grained Encoder for Vision Transformers", NeurIPS 2021 (s124: queries per region side 4, 2 or 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models import generate_default_cfgs
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as timm_filter
from torch import Tensor

from dge_models.reference_keys import refuse_misfit, to_timm_keys
from dge_models.registration import create, data_config, register
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


_KINDS: dict[str, tuple[type[VisionTransformer], str]] = {
    "deit_{}_patch16_256": (VisionTransformer, "timm's plain model, to compare with"),
    "deit_dge_s124_{}_patch16_256": (DGEVisionTransformer, "with Dynamic Grained Encoder blocks"),
    "deit_dge_s124_{}_distilled_patch16_256": (
        DGEVisionTransformerDistilled,
        "with Dynamic Grained Encoder blocks, two prefix tokens and two heads",
    ),
}
_MODELS = {pattern.format(size): (size, *kind) for pattern, kind in _KINDS.items() for size in _WIDTHS}

default_cfgs = generate_default_cfgs(
    {
        name: data_config("patch_embed.proj", **({"classifier": ("head", "head_dist")} if "distilled" in name else {}))
        for name in _MODELS
    }
)


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> VisionTransformer:
    size, model_class, _ = _MODELS[name]
    settings = {"patch_size": 16, "depth": 12, **_WIDTHS[size], **kwargs}
    return create(model_class, name, pretrained, checkpoint_filter_fn, 3, settings)


for _name, (_size, _, _doc) in _MODELS.items():
    register(__name__, _name, f"DeiT-{_size.capitalize()}: {_doc}.", _create)
