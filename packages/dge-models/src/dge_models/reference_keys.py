"""Checkpoints in the layout of the method's reference implementation, brought to timm's parameter names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dge_models.encoder import DGEBlock
from dge_models.pvt_contract import PyramidContract

__all__ = ["accept_reference_keys", "refuse_misfit", "split_mismatch", "to_timm_keys"]

_QUERY = re.compile(r"(?P<attn>.*\battn)\.q\.(?P<kind>weight|bias)")
_ROUTER = re.compile(r"(?P<block>.*\.)?dge\.router\.gate\.(?P<kind>weight|bias)")
_SPLITS = re.compile(r"(?P<block>.*\.)?dge\.splits")
# What only a pyramid has: numbered stages, in the reference's names and in timm's.
_STAGE = re.compile(r"(?P<prefix>(?:.*\.)?)(?P<part>block|patch_embed|pos_embed)(?P<stage>[1-9])(?P<rest>$|\..*)")
_PYRAMID = re.compile(r"(?:.*\.)?stages\.\d+\.")
_PLAIN = re.compile(r"(?:.*\.)?blocks\.\d+\.")
_CLASS_TOKEN = re.compile(r"(?P<prefix>(?:.*\.)?)cls_token")


def to_timm_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and fuse what the reference stores differently.

    ``dge.router.gate`` becomes ``router.gate``; ``dge.splits`` is left out, :func:`split_mismatch` looks at it.
    DeiT: ``attn.q`` and ``attn.kv`` (keys first, then values) become timm's ``attn.qkv``. PVT: stages are
    numbered as in timm's pyramids, ``block1.0`` becomes ``stages.0.blocks.0``, and so on; q and kv stay apart,
    as they are there. Other keys stay, so a state dict in timm's layout comes back unchanged.

    Args:
        state_dict: Parameters by name.

    Returns:
        A new dict; tensors that needed no fusing are the same objects.
    """
    out: dict[str, Tensor] = {}
    state_dict = _number_stages(state_dict)
    for key, value in state_dict.items():
        if _SPLITS.fullmatch(key):
            continue
        if router := _ROUTER.fullmatch(key):
            key = f"{router['block'] or ''}router.gate.{router['kind']}"
        elif _PYRAMID.match(key):
            pass
        elif query := _QUERY.fullmatch(key):
            pair = f"{query['attn']}.kv.{query['kind']}"
            if pair in state_dict:
                out[f"{query['attn']}.qkv.{query['kind']}"] = torch.cat([value, state_dict[pair]])
                continue
        elif re.fullmatch(r".*\battn\.kv\.(weight|bias)", key) and key.replace(".kv.", ".q.") in state_dict:
            continue
        out[key] = value
    return out


def _number_stages(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A pyramid's keys with timm's stages; other keys as they are."""
    last = max((int(match["stage"]) for key in state_dict if (match := _STAGE.fullmatch(key))), default=0)
    if not last:
        return dict(state_dict)
    out = {}
    for key, value in state_dict.items():
        if match := _STAGE.fullmatch(key):
            part = "blocks" if match["part"] == "block" else match["part"]
            key = f"{match['prefix']}stages.{int(match['stage']) - 1}.{part}{match['rest']}"
        elif match := _CLASS_TOKEN.fullmatch(key):
            key = f"{match['prefix']}stages.{last - 1}.cls_token"
        out[key] = value
    return out


def split_mismatch(state_dict: Mapping[str, Tensor], model: nn.Module, prefix: str = "") -> str | None:
    """Compare the split sets that a reference checkpoint names with the model's.

    Args:
        state_dict: Parameters by name, in the reference's layout; other layouts name no splits.
        model: What the checkpoint is for.
        prefix: In front of the model's names in `state_dict`.

    Returns:
        None if they agree, else a sentence that names the first layer in which they differ.
    """
    numbered = _number_stages(state_dict)
    for name, module in model.named_modules():
        stored = numbered.get(f"{prefix}{name}.dge.splits")
        if stored is None or not isinstance(module, DGEBlock):
            continue
        if tuple(stored.tolist()) != module.router.splits:
            got, expected = tuple(stored.tolist()), module.router.splits
            return f"{name}: the checkpoint's splits are {got}; expected the model's, {expected}"
    return None


def _family_mismatch(keys: Iterable[str], model: nn.Module) -> str | None:
    """A sentence if the weights are a pyramid's and the model is none, or the other way round."""
    names = list(keys)
    pyramid = any(_STAGE.fullmatch(key) or _PYRAMID.match(key) for key in names)
    plain = not pyramid and any(_PLAIN.match(key) for key in names)
    if pyramid and isinstance(model, VisionTransformer):
        return f"it holds a pyramid (PVT); expected weights of a {type(model).__name__}"
    if plain and isinstance(model, PyramidContract):
        return f"it holds a vision transformer without stages (DeiT); expected a pyramid's, for {type(model).__name__}"
    return None


def refuse_misfit(state_dict: Mapping[str, Tensor], model: nn.Module, reason: str) -> None:
    """Refuse weights of another kind of model, or of other splits.

    Args:
        state_dict: Parameters by name, in any layout.
        model: What they are for.
        reason: How the error starts.

    Raises:
        ValueError: They don't fit.
    """
    mismatch = _family_mismatch(state_dict, model) or split_mismatch(state_dict, model)
    if mismatch is not None:
        raise ValueError(f"{reason}: {mismatch}")


def _translate(
    module: nn.Module,
    state_dict: dict[str, Tensor],
    prefix: str,
    local_metadata: Mapping[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    own = [key for key in state_dict if key.startswith(prefix)]
    mismatch = _family_mismatch(own, module)
    if mismatch is not None:
        raise ValueError(f"state_dict: doesn't fit: {mismatch}")
    mismatch = split_mismatch(state_dict, module, prefix)
    if mismatch is not None:
        error_msgs.append(mismatch)
    translated = to_timm_keys(state_dict)
    state_dict.clear()
    state_dict.update(translated)


def accept_reference_keys(model: nn.Module) -> None:
    """Let ``model.load_state_dict`` take the reference's names beside timm's.

    timm's ``create_model(..., checkpoint_path=...)`` loads without a filter, so the model itself has to know.

    Args:
        model: Gets a hook; copies and pickles of it keep the hook, and a second one would find nothing to do.
    """
    register: Callable[[Callable[..., None]], object] = model.register_load_state_dict_pre_hook
    register(_translate)
