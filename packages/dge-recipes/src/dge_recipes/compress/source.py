"""The dense model that a user names, and how it wants its pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_data_config
from torch import nn

from dge_recipes.checkpoints import run_config
from dge_recipes.config import ImageData, load_config, need_classification
from dge_recipes.errors import UserError
from dge_recipes.evaluation.target import find_target
from dge_recipes.models import is_routed, open_recipe

__all__ = ["Dense", "load_dense", "load_source"]

_EXPECTED = "expected a model name of timm, hf-hub:NAME, or the folder of a saved model or of a run"


@dataclass(frozen=True)
class Dense:
    """A model that a user names, to make cheaper or to export.

    Attributes:
        name: as the user has it.
        model: in evaluation mode, on the CPU.
        view: the keys of a data section that say how the model wants its pictures: image_size, crop_pct,
            interpolation, mean, std.
    """

    name: str
    model: nn.Module
    view: dict[str, Any]


def load_dense(source: str, image_size: int | None = None) -> Dense:
    """Load a model to make cheaper: as :func:`load_source`, and a UserError if it routes already."""
    dense = load_source(source, image_size)
    if is_routed(dense.model):
        raise UserError(
            f"model {source} routes its queries already; expected a dense one (dge-eval --budget sets other budgets)"
        )
    return dense


def load_source(source: str, image_size: int | None = None) -> Dense:
    """Load a model with its weights.

    Args:
        source: a model's name known to timm, ``local-dir:FOLDER``, ``hf-hub:NAME``, or the folder of a saved model, a
            run or a checkpoint.
        image_size: side of the pictures in pixels; None: what the model was made for. Position embeddings are resized.

    Raises:
        UserError: it is none of these, its weights are not to be had, or it takes no colour pictures of that size.
    """
    if (Path(source) / "config.json").is_file() and run_config(source) is None:
        model, view = _of_timm(f"local-dir:{source}")
    elif Path(source).exists():
        model, view = _of_run(source)
    elif ":" in source or source.split(".")[0] in timm.list_models():
        model, view = _of_timm(source)
    else:
        raise UserError(f"model {source} does not exist, and no model of timm is called so; {_EXPECTED}")
    if image_size is not None:
        _resize(model, source, image_size)
        view["image_size"] = image_size
    _try_pictures(model, source, view["image_size"])
    return Dense(source, model, view)


def _of_run(source: str) -> tuple[nn.Module, dict[str, Any]]:
    recorded = run_config(source)
    if recorded is None:
        raise UserError(f"model {source} is no saved model, and of no run that recorded its config; {_EXPECTED}")
    data = need_classification(load_config(str(recorded)), source).data
    target = find_target(source, None, ())
    model = open_recipe(target.config.model, source)
    if isinstance(data, ImageData):
        names = ("image_size", "crop_pct", "interpolation", "mean", "std")
        return model, {name: getattr(data, name) for name in names}
    return model, {"image_size": data.image_size, "crop_pct": 1.0, "mean": (0.5,) * 3, "std": (0.5,) * 3}


def _of_timm(source: str) -> tuple[nn.Module, dict[str, Any]]:
    try:
        timm.create_model(source, pretrained=False)
    except Exception as error:  # what hubs raise has no class in common
        raise UserError(f"model {source} cannot be created: {_line(error)}") from error
    try:
        model: Any = timm.create_model(source, pretrained=True)
    except Exception as error:
        raise UserError(
            f"the weights of model {source} are not to be had: {_line(error)}; without a network, local-dir:FOLDER "
            "reads a saved model"
        ) from error
    facts = resolve_data_config(model=model)
    _, height, width = facts["input_size"]
    if height != width:
        raise UserError(f"model {source} takes pictures of {height} x {width} pixels; --image-size makes them square")
    view = {
        "image_size": int(height),
        "crop_pct": float(facts["crop_pct"]),
        "interpolation": facts["interpolation"] if facts["interpolation"] == "bilinear" else "bicubic",
        "mean": _three(facts["mean"]),
        "std": _three(facts["std"]),
    }
    return model.eval(), view


def _three(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _resize(model: Any, source: str, image_size: int) -> None:
    try:
        model.set_input_size(img_size=(image_size, image_size))
    except (AttributeError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"--image-size {image_size}: model {source} cannot be set to it: {_line(error)}") from error


def _try_pictures(model: nn.Module, source: str, image_size: int) -> None:
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, image_size, image_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"model {source} cannot take colour pictures of {image_size} x {image_size} pixels: {_line(error)}"
        ) from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
