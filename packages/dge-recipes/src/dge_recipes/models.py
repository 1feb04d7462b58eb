"""Models by name, from a recipe's ``model`` section."""

from difflib import get_close_matches
from typing import Any, TypeGuard

import timm
import torch
from torch import nn

import dge_models
from dge_models import RoutedModel
from dge_recipes.checkpoints.locate import weights_file
from dge_recipes.config.schema import ModelConfig
from dge_recipes.errors import UserError

__all__ = ["RoutedModel", "build_model", "create_model", "display_name", "is_routed", "load_weights"]

# What wrong arguments come to: few models check theirs.
_CREATING = (OSError, TypeError, ValueError, AssertionError, RuntimeError, AttributeError, LookupError, ArithmeticError)


def build_model(
    config: ModelConfig, num_classes: int, input_shape: tuple[int, int, int], *, init: bool = True
) -> nn.Module:
    """Create the network of a recipe.

    Args:
        config: its ``model`` section.
        num_classes: outputs of the head.
        input_shape: (channels, height, width) of the images it will see.
        init: load ``config.init_from``; False where other weights follow anyway.

    Returns:
        The model in training mode, on the CPU. With ``config.convert`` the named model with routed blocks.

    Raises:
        UserError: an unknown model or argument, weights that do not fit, a model that cannot be converted or
            cannot take such images.
    """
    model = create_model(config, num_classes, init=init)
    _try_images(model, config, input_shape)
    return model.train()


def create_model(config: ModelConfig, num_classes: int, *, init: bool = True) -> nn.Module:
    """The same as :func:`build_model`, without trying whether the model takes certain images."""
    if "num_classes" in config.kwargs:
        got = f"model.kwargs.num_classes: got {config.kwargs['num_classes']}"
        raise UserError(f"{got}, expected none: it follows from the data, or the weights")
    model = _create(config.name, {"num_classes": num_classes, **config.kwargs})
    if init and config.init_from is not None:
        load_weights(model, config.init_from, reset_head=True)
    if config.convert is not None:
        try:
            model = dge_models.from_timm(model, config.convert.splits, config.convert.layers)
        except ValueError as error:
            raise UserError(f"model.convert: {config.name} cannot be converted: {error}") from error
    if is_routed(model):
        try:
            dge_models.set_training_mode(model, config.training_mode)
        except ValueError as error:  # it could route, but has no blocks that do
            raise UserError(f"model {config.name} with model.kwargs={config.kwargs}: {error}") from error
    return model


def display_name(config: ModelConfig) -> str:
    """What tables call the model: its timm name, and whether it was converted."""
    return config.name if config.convert is None else f"{config.name} + DGE"


def is_routed(model: nn.Module) -> TypeGuard[RoutedModel]:
    """Whether the model routes its queries, so that its cost varies and a budget applies."""
    return isinstance(model, RoutedModel)


def load_weights(
    model: nn.Module, source: str, *, best: bool = False, ema: bool = False, reset_head: bool = False
) -> None:
    """Load weights into a model, in place.

    Args:
        model: of the same architecture as the weights.
        source: a run folder (its newest checkpoint), a checkpoint folder, or a weights file of this project,
            of timm or of the method's authors.
        best: from a run folder take the best checkpoint instead of the newest.
        ema: take the averaged weights.
        reset_head: leave out a head of another size.

    Raises:
        UserError: nothing there, a damaged file, or weights of another model.
    """
    path, in_file = weights_file(source, best=best, ema=ema)
    try:
        dge_models.load_checkpoint(model, path, use_ema=in_file, reset_head=reset_head)
    except (OSError, ValueError) as error:
        raise UserError(f"weights {path} cannot be loaded: {error}") from error


def _create(name: str, kwargs: dict[str, Any]) -> nn.Module:
    known = timm.list_models()
    # A name with a colon says where to read the model's description from, such as local-dir:PATH.
    if ":" not in name and name.split(".")[0] not in known:
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "expected a name from timm.list_models()"
        raise UserError(f"wrong value for 'model.name': no model is called {name!r}: {hint}")
    try:
        return timm.create_model(name, **kwargs)
    except _CREATING as error:
        raise UserError(f"model {name} cannot be created with model.kwargs={kwargs}: {error}") from error


def _try_images(model: nn.Module, config: ModelConfig, input_shape: tuple[int, int, int]) -> None:
    """One forward: a size that does not fit is a mistake in the config, to be told before any training."""
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *input_shape))
    except (AssertionError, RuntimeError, ValueError) as error:
        message = " ".join(str(error).split())
        raise UserError(
            f"model {config.name} cannot take images of shape {list(input_shape)}: {message}; "
            "see model.kwargs (img_size, in_chans) and data.image_size"
        ) from error
