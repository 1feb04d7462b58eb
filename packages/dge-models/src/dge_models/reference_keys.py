"""Checkpoints in the layout of the method's reference implementation, brought to timm's parameter names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from dge_models.encoder import DGEBlock
from dge_models.families import families, find_family

__all__ = ["accept_reference_keys", "refuse_misfit", "split_mismatch", "to_timm_keys"]

_ROUTER = re.compile(r"(?P<block>.*\.)?dge\.router\.gate\.(?P<kind>weight|bias)")
_SPLITS = re.compile(r"(.*\.)?dge\.splits")


def to_timm_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and fuse what the reference stores differently.

    ``dge.router.gate`` becomes ``router.gate``; ``dge.splits`` is left out, :func:`split_mismatch` looks at it. The
    rest is the families', see :meth:`Family.to_timm_keys`. Other keys stay, so a state dict in timm's layout comes back
    unchanged.

    Args:
        state_dict: Parameters by name.

    Returns:
        A new dict; tensors that needed no fusing are the same objects.
    """
    out: dict[str, Tensor] = {}
    for key, value in _by_families(state_dict).items():
        if router := _ROUTER.fullmatch(key):
            key = f"{router['block'] or ''}router.gate.{router['kind']}"
        if not _SPLITS.fullmatch(key):
            out[key] = value
    return out


def _by_families(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    for family in families():
        state_dict = family.to_timm_keys(state_dict)
    return state_dict


def split_mismatch(state_dict: Mapping[str, Tensor], model: nn.Module, prefix: str = "") -> str | None:
    """Compare the split sets that a reference checkpoint names with the model's.

    Args:
        state_dict: Parameters by name, in the reference's layout; other layouts name no splits.
        model: What the checkpoint is for.
        prefix: In front of the model's names in `state_dict`.

    Returns:
        None if they agree, else a sentence that names the first layer in which they differ.
    """
    splits = _by_families({key: value for key, value in state_dict.items() if _SPLITS.fullmatch(key)})
    for name, module in model.named_modules():
        stored = splits.get(f"{prefix}{name}.dge.splits")
        if stored is None or not isinstance(module, DGEBlock):
            continue
        if tuple(stored.tolist()) != module.router.splits:
            got, expected = tuple(stored.tolist()), module.router.splits
            return f"{name}: the checkpoint's splits are {got}; expected the model's, {expected}"
    return None


def _family_mismatch(keys: Iterable[str], model: nn.Module) -> str | None:
    """A sentence if the weights are of another family than the model, and not of its own."""
    names, own = list(keys), find_family(model)
    if own is None or own.owns_keys(names):
        return None
    owner = next((family for family in families() if family.owns_keys(names)), None)
    return f"it holds {owner.weights}; expected {own.wanted.format(type(model).__name__)}" if owner else None


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
