"""Reading weights: the authors' files, timm's and ours, never running the code in a pickle."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from timm.models import clean_state_dict
from torch import Tensor, nn

from dge_models.families import find_family, fit_one_grid
from dge_models.reference_keys import refuse_misfit, to_timm_keys
from dge_models.routed import routed_blocks

__all__ = ["load_checkpoint", "read_checkpoint"]

_WEIGHTS = ("model", "state_dict")
_EMA_WEIGHTS = ("model_ema", "state_dict_ema")
_HEADS = ("head.", "head_dist.")


def read_checkpoint(path: str | os.PathLike[str], *, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint file to the CPU.

    A ``.safetensors`` file holds tensors alone. Anything else is read by ``torch.load`` with
    ``weights_only=True``; beside tensors and plain containers it may hold an ``argparse.Namespace``, as the
    authors' files do, and nothing else, so no code in the file runs.

    Args:
        path: The file.
        mmap: Leave tensors in the file until they are used, such as to look at names and shapes alone. The file must
            stay as it is meanwhile. PyTorch's files from before version 1.6 are read whole all the same.

    Returns:
        What the file holds. Bare weights come back as ``{"model": weights}``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is truncated, not a checkpoint, or holds objects of other types.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: no checkpoint file at {path}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path, mmap)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"path: {path} holds a {type(content).__name__}; expected a dict of weights")
    if all(isinstance(value, Tensor) for value in content.values()):
        return {"model": content}
    return content


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"path: {path} is truncated or not a safetensors file ({error})") from error


def _read_pickle(path: Path, mmap: bool) -> Any:
    try:
        mapped = mmap and zipfile.is_zipfile(path)  # torch can map no other
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # a damaged file fails in whatever way its first wrong byte leads to
        refused = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused is not None:
            raise ValueError(
                f"path: {path} holds a {refused[1]}; expected tensors, plain containers and argparse.Namespace alone "
                "(nothing else is unpickled, it could run code)"
            ) from error
        raise ValueError(f"path: {path} is truncated or not a PyTorch checkpoint") from error


def _select(checkpoint: Mapping[str, Any], use_ema: bool, path: Path) -> dict[str, Tensor]:
    """The weights, under the names that the model without its wrappers has."""
    names = _EMA_WEIGHTS if use_ema else _WEIGHTS
    found = next((name for name in names if checkpoint.get(name) is not None), None)
    weights = checkpoint[found] if found is not None else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        kind = "EMA weights" if use_ema else "weights"
        keys = ", ".join(sorted(map(str, checkpoint))[:8])
        raise ValueError(f"path: {path} has no {kind} under {' or '.join(names)}; it has {keys}")
    return clean_state_dict(weights)


def load_checkpoint(
    model: nn.Module, path: str | os.PathLike[str], use_ema: bool = False, *, reset_head: bool = False
) -> None:
    """Load weights into a model of this package or of timm.

    Takes the authors' ``.pth`` files as they are, timm's and ours (``.pth`` or ``.safetensors``), with the
    prefixes that DDP and ``torch.compile`` add. A position embedding of another grid is resized (bicubically
    for vision transformers, bilinearly for pyramids), prefix tokens kept.

    Args:
        model: Changed in place, and only if everything fits.
        path: The file.
        use_ema: Load the file's averaged weights instead of the plain ones.
        reset_head: Leave the model's classifier as it is where the file's has another number of classes,
            to fine-tune. Without it such a file is an error.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It can't be read, has no weights of the wanted kind, is of another model, or its routers are for
            other splits than the model's, as far as the file says (see :func:`weights_metadata`).
    """
    path = Path(path)
    checkpoint = read_checkpoint(path)
    weights = _select(checkpoint, use_ema, path)
    origin = getattr(checkpoint.get("args"), "model", None)
    named = f"{path} (of {origin})" if isinstance(origin, str) else str(path)
    refuse_misfit(weights, model, f"path: {named} doesn't fit")
    _refuse_other_splits(checkpoint, path, model, named)
    weights, own = to_timm_keys(weights), model.state_dict()
    family = find_family(model)
    fit = fit_one_grid if family is None else family.fit_positions  # timm has more models than there are families
    try:
        weights = fit(weights, model)
    except ValueError as error:
        raise ValueError(f"path: {named} doesn't fit: {error}") from error
    if reset_head:
        weights = _keep_head(weights, own)
    _check_fit(weights, own, type(model).__name__, named)
    model.load_state_dict(weights)


def _refuse_other_splits(checkpoint: Mapping[str, Any], path: Path, model: nn.Module, named: str) -> None:
    """Compare the split sets that a file's metadata name with the model's."""
    own = [block.router.splits for block in routed_blocks(model)]
    sets = _splits_of_file(path, named) if path.suffix == ".safetensors" else _splits_of_pickle(checkpoint)
    for got, expected in zip(sets * len(own) if len(sets) == 1 else sets, own, strict=False):
        if got != expected:
            raise ValueError(f"path: {named} doesn't fit: its splits are {got}; expected the model's, {expected}")


def _splits_of_file(path: Path, named: str) -> list[tuple[int, ...]]:
    """Of a safetensors file: one for all routed blocks, one for each, or none."""
    with safetensors.safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get("splits")
    if text is None:
        return []
    try:
        stored = json.loads(text)
        return [tuple(part) for part in stored] if isinstance(stored[0], list) else [tuple(stored)]
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"path: {named} has splits {text!r} in its metadata; expected JSON of a split set") from error


def _splits_of_pickle(checkpoint: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Of state dicts as torch saves them: one for each routed block, or none."""
    found = (getattr(checkpoint.get(name), "_metadata", None) for name in (*_WEIGHTS, *_EMA_WEIGHTS))
    metadata: Mapping[str, Any] = next((entry for entry in found if entry is not None), {})
    return [tuple(entry["splits"]) for entry in metadata.values() if "splits" in entry]


def _keep_head(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights, with the model's own head where the stored one has another size."""
    fitting = {k: v for k, v in weights.items() if not k.startswith(_HEADS) or (k in own and v.shape == own[k].shape)}
    return {**{k: v for k, v in own.items() if k.startswith(_HEADS)}, **fitting}


def _differs(stored: Tensor | None, own: Tensor) -> bool:
    return stored is not None and stored.shape != own.shape


def _check_fit(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], model_name: str, named: str) -> None:
    problems = []
    for label, keys in (
        ("missing", own.keys() - weights.keys()),
        ("unexpected", weights.keys() - own.keys()),
    ):
        if keys:
            shown = sorted(keys)
            more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
            problems.append(f"{label} {', '.join(shown[:3])}{more}")
    shapes = [
        f"{key} is {tuple(weights[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if _differs(weights.get(key), own[key])
    ]
    if shapes:
        head = all(shape.startswith(_HEADS) for shape in shapes)
        hint = " (reset_head=True keeps the model's own head)" if head and not problems else ""
        more = f" and {len(shapes) - 3} more" if len(shapes) > 3 else ""
        problems.append("; ".join(shapes[:3]) + more + hint)
    if problems:
        raise ValueError(f"path: {named} doesn't fit {model_name}: {'; '.join(problems)}")
