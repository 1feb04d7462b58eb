"""What the registered models share: their data configuration, and how timm builds them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

from dge_models.reference_keys import accept_reference_keys
from dge_models.routed import routed_blocks
from dge_models.static_queries import set_fixed_queries

__all__ = ["Filter", "create", "data_config", "register"]

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
    model_class: Callable[..., Model],
    variant: str,
    pretrained: bool,
    pretrained_filter: Filter,
    out_indices: int | tuple[int, ...],
    kwargs: Mapping[str, Any],
) -> Model:
    """Build a registered model the way timm does.

    Args:
        model_class: Of the model, or what makes it from its arguments.
        variant: Its registered name.
        pretrained: As in ``timm.create_model``.
        pretrained_filter: Brings pretrained weights to the model's names and sizes.
        out_indices: Which features ``features_only`` returns, unless `kwargs` say.
        kwargs: Of the model, and three for all of this package's names: ``fixed_counts`` and ``fixed_image_size``, as
            :func:`set_fixed_queries` takes them, and ``trained_splits``, the splits of the weights' routers.

    Returns:
        The model, which loads the reference's checkpoints too.

    Raises:
        ValueError: ``trained_splits`` are not the model's and weights are to be loaded, or the counts don't fit.
    """
    settings = dict(kwargs)
    counts, size = settings.pop("fixed_counts", None), settings.pop("fixed_image_size", None)
    trained = settings.pop("trained_splits", None)

    def build(**arguments: Any) -> Model:
        model = model_class(**arguments)
        # What later versions of timm keep too, to save it.
        recorded: Any = model
        recorded._model_args = {key: value for key, value in kwargs.items() if key not in _NO_ARGUMENTS}
        if pretrained and trained is not None:
            _refuse_other_splits(model, trained)
        if counts:
            _fix(model, counts, size)
        return model

    model: Model = build_model_with_cfg(
        build,
        variant,
        pretrained,
        pretrained_filter_fn=pretrained_filter,
        feature_cfg={"out_indices": settings.pop("out_indices", out_indices), "feature_cls": "getter"},
        **settings,
    )
    accept_reference_keys(model)
    return model


_NO_ARGUMENTS = ("pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "cache_dir", "device", "dtype")


def _refuse_other_splits(model: nn.Module, trained: Sequence[int]) -> None:
    for block in routed_blocks(model):
        if block.router.splits != tuple(trained):
            raise ValueError(
                f"splits: got {block.router.splits}; expected {tuple(trained)}, with which the weights were trained"
            )


def _fix(model: nn.Module, counts: Any, size: Any) -> None:
    try:
        set_fixed_queries(model, counts, image_size=None if size is None else tuple(size))
    except ValueError as error:
        raise ValueError(f"fixed_counts: {error} (fixed_counts=() leaves the queries dynamic)") from error


def register(module: str, name: str, doc: str, build: Callable[[str, bool, dict[str, Any]], nn.Module]) -> None:
    """Give a module a function of a model's name, and timm its entry point.

    Args:
        module: Name of the module; its ``default_cfgs`` has the model's.
        name: Of the model.
        doc: Of the function.
        build: Makes the model from its name, ``pretrained`` and other arguments.
    """

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build(name, pretrained, kwargs)

    entry.__name__ = entry.__qualname__ = name
    entry.__module__, entry.__doc__ = module, doc
    setattr(sys.modules[module], name, register_model(entry))
