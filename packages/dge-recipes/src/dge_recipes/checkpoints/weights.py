"""A model with its weights, from a checkpoint of ours or of the method's authors."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

import dge_models
from dge_recipes.checkpoints.locate import run_config, weights_file
from dge_recipes.config import ModelConfig, load_config
from dge_recipes.errors import UserError
from dge_recipes.models import create_model, load_weights

__all__ = ["open_recipe", "open_weights"]


def open_weights(
    source: str, model: str | None, kwargs: dict[str, Any], *, ema: bool = False, best: bool = False
) -> tuple[str, nn.Module]:
    """Build the model that a checkpoint is of, and load it.

    Args:
        source: a run folder, a checkpoint folder or a weights file.
        model: name of the model known to timm; None: what the run's config or the authors' file says.
        kwargs: the model's arguments; the number of classes follows from the weights.
        ema: the averaged weights.
        best: of a run, the best checkpoint instead of the newest.

    Returns:
        The model's name and the model, in evaluation mode on the CPU.

    Raises:
        UserError: nothing there, an unknown model, or weights that do not fit.
    """
    recorded = run_config(source)
    if model is not None:
        settings = ModelConfig(name=model, kwargs=kwargs)
    elif recorded is not None:
        settings = load_config(str(recorded)).model
    else:
        named = getattr(_read(weights_file(source, best=best, ema=ema)[0]).get("args"), "model", None)
        if not isinstance(named, str):
            raise UserError(f"{source} does not say which model it is of: add --model NAME")
        settings = ModelConfig(name=named, kwargs=kwargs)
    return settings.name, open_recipe(settings, source, ema=ema, best=best)


def open_recipe(settings: ModelConfig, source: str, *, ema: bool = False, best: bool = False) -> nn.Module:
    """Build a recipe's model with as many classes as its weights have, and load them.

    Args:
        settings: the ``model`` section.
        source, ema, best: as for :func:`open_weights`.

    Returns:
        The model, in evaluation mode on the CPU.

    Raises:
        UserError: nothing there, an unknown model, or weights that do not fit.
    """
    path, in_file = weights_file(source, best=best, ema=ema)
    network = create_model(settings, _num_classes(_read(path)), init=False)
    load_weights(network, str(path), ema=in_file)
    return network.eval()


def _read(path: Path) -> dict[str, Any]:
    try:
        return dge_models.read_checkpoint(path)
    except ValueError as error:
        raise UserError(f"weights {path} cannot be loaded: {error}") from error


def _num_classes(content: dict[str, Any]) -> int:
    """Outputs of the head; 1000 where it cannot be told, and loading says what does not fit."""
    for weights in content.values():
        if isinstance(weights, dict):
            for key, value in weights.items():
                if key.removeprefix("module.") in {"head.weight", "fc.weight"} and isinstance(value, Tensor):
                    return int(value.shape[0])
    return 1000
