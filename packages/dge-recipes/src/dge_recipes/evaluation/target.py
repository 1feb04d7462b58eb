"""What ``dge-eval`` is to evaluate: a run, a weights file, or a model with timm's own weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.data.config import resolve_data_config

from dge_recipes.checkpoints import run_config, weights_file
from dge_recipes.checkpoints.stored_classes import stored_model
from dge_recipes.classes import Classes
from dge_recipes.config import Config, ImageData, list_configs, load_config, need_classification
from dge_recipes.errors import UserError
from dge_recipes.models import output_names

__all__ = ["Target", "find_target"]

_TIMM_BASE = "deit_tiny_256"


@dataclass(frozen=True)
class Target:
    """A model and the data to evaluate it on.

    Attributes:
        config: both, as a recipe.
        weights: run, checkpoint folder or file that holds the model's weights; None: the model brings its own.
        own_classes: what the outputs of a model that brings its own weights stand for.
    """

    config: Config
    weights: str | None
    own_classes: Classes | None = None

    def find_weights(self, *, best: bool = False, ema: bool = False) -> tuple[Path, bool] | None:
        """The file of the weights, verified, and whether the averaged ones are inside; None: the model brings its own.

        Args:
            best: of a run, the best checkpoint instead of the newest.
            ema: the averaged weights.

        Raises:
            UserError: nothing there, or a damaged file.
        """
        return None if self.weights is None else weights_file(self.weights, best=best, ema=ema)


def find_target(source: str, recipe: str | None, overrides: Sequence[str]) -> Target:
    """Find out what a user means.

    Args:
        source: a path, or a model's name known to timm (also ``local-dir:PATH`` and ``hf-hub:NAME``). A folder that
            :func:`dge_models.save_pretrained` or timm wrote is its model.
        recipe: the recipe that was named, or None: that of the run, or of the model that the authors' file names.
        overrides: ``section.key=value`` each.

    Raises:
        UserError: it is none of these, or no recipe is known for it.
    """
    if Path(source).exists():
        recorded = run_config(source)
        if recorded is None and (Path(source) / "config.json").is_file():
            return _timm_target(f"local-dir:{source}", recipe, overrides)
        name = recipe or (str(recorded) if recorded is not None else _recipe_of_file(source))
        return Target(load_config(name, overrides), source)
    if ":" in source or source.split(".")[0] in timm.list_models():
        return _timm_target(source, recipe, overrides)
    raise UserError(f"{source} does not exist, and no model of timm is called so")


def _recipe_of_file(source: str) -> str:
    """The authors' files say which model they are of."""
    unknown = f"{source} belongs to no run that recorded its config: say which recipe, --config NAME_OR_FILE"
    if not Path(source).is_file():
        raise UserError(unknown)
    model = stored_model(Path(source))
    for name in list_configs():
        if model is not None and load_config(name).model.name == model:
            return name
    raise UserError(unknown)


def _timm_target(source: str, recipe: str | None, overrides: Sequence[str]) -> Target:
    """Timm's weights, evaluated with the preprocessing that they were trained for."""
    config = need_classification(load_config(recipe or _TIMM_BASE, overrides), recipe or _TIMM_BASE)
    settings = {"name": source, "kwargs": {"pretrained": True}, "init_from": None, "convert": None}
    try:
        model: Any = timm.create_model(source, pretrained=False)
        facts = resolve_data_config(model=model)
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
    seen = config.data.model_copy(update=data) if isinstance(config.data, ImageData) else config.data
    config = config.model_copy(update={"model": config.model.model_copy(update=settings), "data": seen})
    return Target(config, None, Classes(int(model.pretrained_cfg["num_classes"]), output_names(model)))
