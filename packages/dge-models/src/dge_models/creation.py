"""How to create a model again: its registered name and the arguments, read from the model as it is now."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from torch import nn

from dge_models.families import find_family
from dge_models.routing_arguments import ENTRY, ROUTING_ARGUMENTS, routing_arguments

__all__ = ["architecture_of", "check_recreation", "creation_arguments"]

_ENTRY = ("base", "base_args", *ROUTING_ARGUMENTS)
# Where a model is put, what is taken of it, and its classes, which stand beside the arguments.
_NOT_STORED = (
    *("device", "dtype", "features_only", "out_indices", "feature_cls", "pretrained_cfg", "pretrained_cfg_overlay"),
    *("pretrained_model_args", "cache_dir", "num_classes"),
)
# What a training run chooses and timm does not store either: rates of dropout, and how attention is computed.
_CHANGEABLE = {"training", "grad_checkpointing", "fused_attn", "inplace", "p", "drop_prob", "scale_by_keep"}
_DROPPING = {"Identity", "Dropout", "DropPath", "PatchDropout"}


def architecture_of(model: nn.Module) -> str:
    """The name under which timm creates a model.

    Raises:
        ValueError: It was not made by ``timm.create_model``, or it was converted from one that was not.
    """
    name = getattr(model, "pretrained_cfg", {}).get("architecture")
    if not isinstance(name, str) or not timm.is_model(name):
        kind = type(model).__name__
        raise ValueError(
            f"model: got a {kind} that timm knows no name of; expected one from timm.create_model, or from_timm of one"
        )
    return name


def _size(model: Any) -> Any:
    family = find_family(model)
    size = None if family is None else family.input_size(model)
    return None if size is None else list(size)


def _patch(model: Any) -> Any:
    rows, cols = model.patch_embed.patch_size
    return rows if rows == cols else [rows, cols]


def _channels(model: Any) -> Any:
    return next(module for module in model.modules() if isinstance(module, nn.Conv2d)).in_channels


def _hidden_ratio(model: Any) -> Any:
    hidden, width = model.blocks[0].mlp.fc1.out_features, model.embed_dim
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _norm_after_pooling(model: Any) -> Any:
    """Whether there is one, if not as the pooling implies: after a change of the pooling it stays what it was."""
    present = not isinstance(model.fc_norm, nn.Identity)
    return None if present == (model.global_pool in ("avg", "avgmax", "max")) else present


# Arguments of the plain models that can be read from them: older versions of timm keep none.
_READ: dict[str, Callable[[Any], Any]] = {
    "img_size": _size,
    "patch_size": _patch,
    "in_chans": _channels,
    "global_pool": lambda model: model.global_pool,
    "embed_dim": lambda model: model.patch_embed.proj.out_channels,
    "depth": lambda model: len(model.blocks),
    "num_heads": lambda model: model.blocks[0].attn.num_heads,
    "mlp_ratio": _hidden_ratio,
    "class_token": lambda model: model.cls_token is not None,
    "reg_tokens": lambda model: model.num_reg_tokens,
    "fc_norm": _norm_after_pooling,
    "no_embed_class": lambda model: model.no_embed_class,
    "dynamic_img_size": lambda model: model.dynamic_img_size,
    "qk_norm": lambda model: not isinstance(model.blocks[0].attn.q_norm, nn.Identity),
}


def _read(name: str, model: nn.Module) -> Any:
    try:
        return _READ[name](model)
    except (AttributeError, IndexError, StopIteration):  # a family without such a part
        return None


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists."""
    return [_plain(part) for part in value] if isinstance(value, (tuple, list)) else value


def _plain_arguments(model: nn.Module, name: str, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The plain model's arguments: what was recorded when it was made, and what it has otherwise than by default."""
    arguments = {
        key: value
        for key, value in recorded.items()
        if key not in (*_ENTRY, *_NOT_STORED) and not (key.endswith("drop_rate") or key == "drop_path_rate")
    }
    default = _on_meta(name, {})
    for key in _READ:
        current = _read(key, model)
        if current is None:
            continue
        if _plain(current) != _plain(_read(key, default)):
            arguments[key] = current
        elif key in arguments:
            del arguments[key]
    return arguments


def creation_arguments(model: Any) -> dict[str, Any]:
    """The arguments with which ``timm.create_model`` gives a model of this one's structure and modes.

    Args:
        model: From ``timm.create_model`` or :func:`from_timm`; its arguments are read from what it is now, so later
            changes by ``reset_classifier``, ``set_input_size`` or :func:`set_fixed_queries` are among them.

    Returns:
        Values that JSON can hold; the number of classes is not among them.

    Raises:
        ValueError: timm knows no name of the model.
    """
    name = architecture_of(model)
    recorded = model.__dict__.get("_model_args", {})
    if name != ENTRY:
        return _plain_values({**_plain_arguments(model, name, recorded), **routing_arguments(model)})
    base = model.__dict__.get("base_architecture")
    if not isinstance(base, str):
        raise ValueError(
            f"model: got a converted {type(model).__name__} whose plain model timm knows no name of; expected one from "
            "from_timm(timm.create_model(...))"
        )
    nested = {**recorded.get("base_args", {}), **recorded}
    arguments = _plain_arguments(model, base, nested)
    return _plain_values({"base": base, **({"base_args": arguments} if arguments else {}), **routing_arguments(model)})


def _plain_values(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: _plain_values(value) if isinstance(value, dict) else _plain(value) for key, value in arguments.items()}


def _on_meta(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, pretrained=False, **arguments)


def check_recreation(model: Any, arguments: Mapping[str, Any]) -> nn.Module:
    """Refuse a model that its arguments don't describe, because it was changed by hand.

    Args:
        model: Compared with what timm creates: names and shapes of its weights, and the settings of its layers.
        arguments: From :func:`creation_arguments`.

    Returns:
        What timm creates, on the meta device.

    Raises:
        ValueError: They differ; the error names the first difference.
    """
    name = architecture_of(model)
    try:
        other = _on_meta(name, {"num_classes": model.num_classes, **arguments})
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f"model: timm.create_model({name!r}, **{dict(arguments)}) fails: {error}") from error
    difference = _difference(model, other)
    if difference is not None:
        raise ValueError(
            f"model: was changed in a way that its arguments don't tell: {difference} in what "
            f"timm.create_model({name!r}, **{dict(arguments)}) gives"
        )
    return other


def _difference(model: nn.Module, other: nn.Module) -> str | None:
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    expected = {key: tuple(value.shape) for key, value in other.state_dict().items()}
    for key in sorted(shapes.keys() | expected.keys()):
        got, wanted = shapes.get(key, "missing"), expected.get(key, "missing")
        if got != wanted:
            return f"{key} is {got}; expected {wanted} as"
    modules = dict(model.named_modules())
    for path, module in other.named_modules():
        mine = modules.get(path)
        kinds = ("nothing" if mine is None else type(mine).__name__, type(module).__name__)
        if _DROPPING & set(kinds):
            continue
        if mine is None or kinds[0] != kinds[1]:
            return f"{path} is {kinds[0]}; expected {kinds[1]} as"
        settings = _settings(mine)
        for key, value in _settings(module).items():
            if settings.get(key, value) != value:
                return f"{path or type(model).__name__}.{key} is {settings[key]!r}; expected {value!r} as"
    return None


def _settings(module: nn.Module) -> dict[str, Any]:
    """Numbers, texts and tuples among a layer's attributes."""
    return {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_") and key not in _CHANGEABLE and isinstance(value, (bool, int, float, str, tuple))
    }
