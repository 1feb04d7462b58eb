"""What ``dge-eval`` is to evaluate: a run, a weights file, or a model with timm's own weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.data.config import resolve_data_config

import dge_models
from dge_recipes.checkpoints import run_config
from dge_recipes.config import Config, ImageData, list_configs, load_config
from dge_recipes.errors import UserError

__all__ = ["Subject", "find_subject"]

_TIMM_BASE = "deit_tiny_256"


@dataclass(frozen=True)
class Subject:
    """A model and the data to evaluate it on.

    Attributes:
        config: both, as a recipe.
        weights: run, checkpoint folder or file that holds the model's weights; None: the model brings its own.
    """

    config: Config
    weights: str | None


def find_subject(source: str, recipe: str | None, overrides: Sequence[str]) -> Subject:
    """Find out what a user means.

    Args:
        source: a path, or a model's name known to timm (also ``local-dir:PATH`` and ``hf-hub:NAME``).
        recipe: the recipe that was named, or None: that of the run, or of the model that the authors' file names.
        overrides: ``section.key=value`` each.

    Raises:
        UserError: it is none of these, or no recipe is known for it.
    """
    if Path(source).exists():
        recorded = run_config(source)
        name = recipe or (str(recorded) if recorded is not None else _recipe_of_file(source))
        return Subject(load_config(name, overrides), source)
    if ":" in source or source.split(".")[0] in timm.list_models():
        return Subject(_timm_config(source, recipe, overrides), None)
    raise UserError(f"{source} does not exist, and no model of timm is called so")


def _recipe_of_file(source: str) -> str:
    """The authors' files say which model they are of."""
    unknown = f"{source} belongs to no run that recorded its config: say which recipe, --config NAME_OR_FILE"
    if not Path(source).is_file():
        raise UserError(unknown)
    try:
        arguments: Any = dge_models.read_checkpoint(source).get("args")
    except ValueError as error:
        raise UserError(f"weights {source} cannot be loaded: {error}") from error
    model = getattr(arguments, "model", None)
    for name in list_configs():
        if model is not None and load_config(name).model.name == model:
            return name
    raise UserError(unknown)


def _timm_config(source: str, recipe: str | None, overrides: Sequence[str]) -> Config:
    """Timm's weights, evaluated with the preprocessing that they were trained for."""
    config = load_config(recipe or _TIMM_BASE, overrides)
    model = config.model.model_copy(
        update={"name": source, "kwargs": {"pretrained": True}, "init_from": None, "convert": None}
    )
    if not isinstance(config.data, ImageData):
        return config.model_copy(update={"model": model})
    try:
        facts = resolve_data_config(model=timm.create_model(source, pretrained=False))
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"model {source} cannot be created: {error}") from error
    data = {
        "image_size": facts["input_size"][-1],
        "mean": tuple(facts["mean"]),
        "std": tuple(facts["std"]),
        "crop_pct": facts["crop_pct"],
        "interpolation": facts["interpolation"] if facts["interpolation"] != "random" else "bicubic",
    }
    chosen = {override.partition("=")[0] for override in overrides}
    data = {key: value for key, value in data.items() if f"data.{key}" not in chosen}
    return config.model_copy(update={"model": model, "data": config.data.model_copy(update=data)})
