"""What the registered models share: their data configuration, and how timm builds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg
from torch import Tensor, nn

from dge_models.reference_keys import accept_reference_keys

__all__ = ["create", "data_config"]

Model = TypeVar("Model", bound=nn.Module)
Filter = Callable[[Mapping[str, Tensor], Any], dict[str, Tensor]]


def data_config(first_conv: str, **kwargs: Any) -> dict[str, Any]:
    """A timm ``default_cfg`` for 256 pixels, as the published models were evaluated.

    Args:
        first_conv: Name of the layer that sees the image.
        **kwargs: What a family adds or has otherwise.
    """
    return {
        "num_classes": 1000,
        "input_size": (3, 256, 256),
        "pool_size": None,
        "crop_pct": 0.875,  # the short side is resized to 292
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": "head",
        "license": "apache-2.0",
        **kwargs,
    }


def create(
    model_class: type[Model],
    variant: str,
    pretrained: bool,
    pretrained_filter: Filter,
    out_indices: int | tuple[int, ...],
    kwargs: Mapping[str, Any],
) -> Model:
    """Build a registered model the way timm does.

    Args:
        model_class: Of the model.
        variant: Its registered name.
        pretrained: As in ``timm.create_model``.
        pretrained_filter: Brings pretrained weights to the model's names and sizes.
        out_indices: Which features ``features_only`` returns, unless `kwargs` say.
        kwargs: Of the model.

    Returns:
        The model, which loads the reference's checkpoints too.
    """
    model: Model = build_model_with_cfg(
        model_class,
        variant,
        pretrained,
        pretrained_filter_fn=pretrained_filter,
        feature_cfg={"out_indices": kwargs.get("out_indices", out_indices), "feature_cls": "getter"},
        **{name: value for name, value in kwargs.items() if name != "out_indices"},
    )
    accept_reference_keys(model)
    return model
