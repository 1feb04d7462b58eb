"""Checkpoints in the layout of the method's reference implementation, brought to timm's parameter names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dge_models.encoder import DGEBlock

__all__ = ["accept_reference_keys", "split_mismatch", "to_timm_keys"]

_QUERY = re.compile(r"(?P<attn>.*\battn)\.q\.(?P<kind>weight|bias)")
_ROUTER = re.compile(r"(?P<block>.*\.)?dge\.router\.gate\.(?P<kind>weight|bias)")
_SPLITS = re.compile(r"(?P<block>.*\.)?dge\.splits")


def to_timm_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and fuse what the reference stores differently.

    ``attn.q`` and ``attn.kv`` (keys first, then values) become timm's ``attn.qkv``; ``dge.router.gate``
    becomes ``router.gate``; ``dge.splits`` is left out, :func:`split_mismatch` looks at it. Other keys stay,
    so a state dict in timm's layout comes back unchanged.

    Args:
        state_dict: Parameters by name.

    Returns:
        A new dict; tensors that needed no fusing are the same objects.
    """
    out: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if query := _QUERY.fullmatch(key):
            pair = f"{query['attn']}.kv.{query['kind']}"
            if pair in state_dict:
                out[f"{query['attn']}.qkv.{query['kind']}"] = torch.cat([value, state_dict[pair]])
                continue
        elif re.fullmatch(r".*\battn\.kv\.(weight|bias)", key) and key.replace(".kv.", ".q.") in state_dict:
            continue
        elif router := _ROUTER.fullmatch(key):
            key = f"{router['block'] or ''}router.gate.{router['kind']}"
        elif _SPLITS.fullmatch(key):
            continue
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
    for name, module in model.named_modules():
        stored = state_dict.get(f"{prefix}{name}.dge.splits")
        if stored is None or not isinstance(module, DGEBlock):
            continue
        if tuple(stored.tolist()) != module.router.splits:
            got, expected = tuple(stored.tolist()), module.router.splits
            return f"{name}: the checkpoint's splits are {got}; expected the model's, {expected}"
    return None


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
