"""The registered name of every converted model: ``timm.create_model("dge_vit", base=..., splits=...)``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import timm
from timm.models import PretrainedCfg, register_model, split_model_name_tag
from torch import Tensor, nn

from dge_models.convert import from_timm
from dge_models.encoder import DropPathMode, TrainingMode
from dge_models.families import family_of
from dge_models.merge_tokens import merging_like
from dge_models.reference_keys import refuse_misfit, to_timm_keys
from dge_models.registration import create
from dge_models.routing_arguments import ENTRY

__all__ = ["checkpoint_filter_fn", "dge_vit"]

_OF_FEATURES = ("features_only", "out_indices", "feature_cls")


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Bring pretrained weights to the model's names and sizes, for timm's pretrained loading.

    Args:
        state_dict: In the reference's or timm's layout.
        model: What they are for.

    Returns:
        Weights under timm's names, the position embedding resized where the grid differs.

    Raises:
        ValueError: The weights are of another kind of model, or their split sets are not the model's.
    """
    refuse_misfit(state_dict, model, "state_dict: doesn't fit")
    return family_of(model).fit_positions(to_timm_keys(state_dict), model)


@register_model
def dge_vit(
    pretrained: bool = False,
    *,
    base: str | None = None,
    base_args: Mapping[str, Any] | None = None,
    splits: tuple[int, ...] = (4, 2, 1),
    layers: Iterable[int] | None = None,
    training_mode: TrainingMode = "dense",
    drop_path_mode: DropPathMode = "image",
    fixed_counts: Sequence[int] | Sequence[Sequence[int]] | None = None,
    fixed_image_size: tuple[int, int] | None = None,
    trained_splits: Sequence[int] | None = None,
    merge_thresholds: Sequence[float] | None = None,
    merge_limits: Sequence[int] | None = None,
    merge_counts: Sequence[int] | None = None,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """A plain model of timm, converted by :func:`from_timm` or, given what merges, by :func:`merge_tokens`.

    It is what a folder of :func:`save_pretrained` names.

    Args:
        pretrained: Load weights: those of the folder, hub page or file that ``timm.create_model`` was given, which are
            a converted model's; without one of these, those that timm has for the plain model.
        base: The plain model's registered name, with a tag or without, such as ``"deit3_small_patch16_224"``.
        base_args: Arguments of the plain model.
        splits: As in :func:`from_timm`.
        layers: As in :func:`from_timm`.
        training_mode: As in :func:`from_timm`.
        drop_path_mode: As in :func:`from_timm`.
        fixed_counts: What :func:`set_fixed_queries` takes; None or () leaves the queries dynamic.
        fixed_image_size: The images for which the queries are fixed; by default the model's own size.
        trained_splits: The splits of the weights' routers; pretrained weights of others are refused.
        merge_thresholds: Per block, the cosine above which tokens merge; then no block routes.
        merge_limits: Per block, how many tokens of an image merge at most, beside the thresholds.
        merge_counts: Instead of thresholds, per block, how many tokens of every image merge.
        pretrained_cfg: As in ``timm.create_model``.
        pretrained_cfg_overlay: As in ``timm.create_model``.
        cache_dir: As in ``timm.create_model``.
        **kwargs: More arguments of the plain model; they win over `base_args`.

    Returns:
        The converted model, or with ``features_only=True`` its features.

    Raises:
        ValueError: `base` is missing or unknown, `splits` are not the weights', or as in :func:`from_timm`.
    """
    _check_base(base)
    own_weights = isinstance(pretrained_cfg, Mapping | PretrainedCfg) or _names_source(pretrained_cfg_overlay)
    of_features = {key: kwargs.pop(key) for key in _OF_FEATURES if key in kwargs}
    described = kwargs.pop("pretrained_model_args", None)  # for timm's loading of these weights, not of the base's
    settings = {**(base_args or {}), **kwargs}
    plain = timm.create_model(
        str(base),
        pretrained=pretrained and not own_weights,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        cache_dir=cache_dir,
        **settings,
    )
    merging = {"merge_thresholds": merge_thresholds, "merge_limits": merge_limits, "merge_counts": merge_counts}
    converted: Any
    if any(value is not None for value in merging.values()):
        converted = merging_like(plain, merge_thresholds, merge_limits, merge_counts)
    else:
        converted = from_timm(plain, splits, layers, training_mode=training_mode, drop_path_mode=drop_path_mode)
    del plain
    return create(
        lambda **_: converted,
        ENTRY,
        pretrained and own_weights,
        checkpoint_filter_fn,
        3,
        {
            **settings,
            **of_features,
            **({} if described is None else {"pretrained_model_args": described}),
            "pretrained_cfg": dict(converted.pretrained_cfg),
            "cache_dir": cache_dir,
            "splits": splits,
            "fixed_counts": fixed_counts,
            "fixed_image_size": fixed_image_size,
            "trained_splits": trained_splits,
            **merging,
        },
    )


def _names_source(config: Mapping[str, Any] | None) -> bool:
    """Whether a configuration says where weights are."""
    return any((config or {}).get(key) for key in ("url", "file", "state_dict", "hf_hub_id"))


def _check_base(base: str | None) -> None:
    """A ValueError if timm has no such model."""
    name = split_model_name_tag(base)[0] if isinstance(base, str) else ""
    if not timm.is_model(name) or name == ENTRY:
        raise ValueError(
            f"base: got {base!r}; expected the registered name of a plain model, such as 'deit3_small_patch16_224' "
            "(models from a hub or folder are converted by from_timm; a folder that names no base was written without "
            "model_args: dge_models.save_pretrained writes them)"
        )
