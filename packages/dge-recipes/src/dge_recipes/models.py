"""Models by name, from a recipe's ``model`` section, and with the weights of a checkpoint."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, TypeGuard

import timm
import torch
from torch import nn

import dge_models
from dge_models import RoutedModel
from dge_recipes.checkpoints.store import run_config, weights_file
from dge_recipes.checkpoints.stored_classes import stored_classes, stored_model
from dge_recipes.classes import Classes, match_classes
from dge_recipes.config import ModelConfig, load_config, need_classification
from dge_recipes.errors import UserError

__all__ = [
    "RoutedModel",
    "build_model",
    "create_model",
    "display_name",
    "is_routed",
    "load_weights",
    "name_outputs",
    "open_recipe",
    "open_weights",
    "output_names",
    "own_classes",
    "routed_part",
    "try_images",
]

# What wrong names and missing arguments or files come to; and beside them wrong arguments, for few models check theirs.
_NAMED = (OSError, TypeError, ValueError)
_CALLED = (*_NAMED, AssertionError, RuntimeError, AttributeError, LookupError, ArithmeticError)


def build_model(
    config: ModelConfig,
    num_classes: int,
    input_shape: tuple[int, int, int],
    *,
    init: bool = True,
    classes: Classes | None = None,
    new_head: bool = False,
) -> nn.Module:
    """Create the network of a recipe.

    Args:
        config: its ``model`` section.
        num_classes: outputs of the head.
        input_shape: (channels, height, width) of the images it will see.
        init: load ``config.init_from``; False where other weights follow anyway.
        classes: what the outputs stand for; those that ``config.init_from`` knows must be the same.
        new_head: leave out the head of ``config.init_from``.

    Returns:
        The model in training mode, on the CPU. With ``config.convert`` the named model with routed blocks.

    Raises:
        UserError: an unknown model or argument, weights that do not fit or know other classes, a model that cannot
            be converted or cannot take such images.
    """
    model = create_model(config, num_classes, init=init, classes=classes, new_head=new_head)
    try_images(model, config, input_shape)
    return model.train()


def create_model(
    config: ModelConfig,
    num_classes: int,
    *,
    init: bool = True,
    classes: Classes | None = None,
    new_head: bool = False,
) -> nn.Module:
    """The same as :func:`build_model`, without trying whether the model takes certain images."""
    if "num_classes" in config.kwargs:
        got = f"model.kwargs.num_classes: got {config.kwargs['num_classes']}"
        raise UserError(f"{got}, expected none: it follows from the data, or the weights")
    model = _create(config.name, {"num_classes": num_classes, **config.kwargs})
    if init and config.kwargs.get("pretrained") and classes is not None:
        _check_pretrained(model, classes, new_head)
    if init and config.init_from is not None:
        _start_from(model, config.init_from, classes, new_head)
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
    if classes is not None:
        name_outputs(model, classes.names)
    return model


def display_name(config: ModelConfig) -> str:
    """What tables call the model: its timm name, and whether it was converted."""
    return config.name if config.convert is None else f"{config.name} + DGE"


def is_routed(model: nn.Module) -> TypeGuard[RoutedModel]:
    """Whether the model routes its queries, so that its cost varies and a budget applies."""
    return isinstance(model, RoutedModel)


def routed_part(model: nn.Module) -> nn.Module:
    """The routed model that a network is or holds, a detector in its backbone; the network itself if there is none."""
    return next(filter(is_routed, model.modules()), model)


def output_names(model: nn.Module) -> tuple[str, ...] | None:
    """Names of the classes that a model's outputs stand for, where they are known."""
    names: Any = getattr(model, "pretrained_cfg", {}).get("label_names")
    if isinstance(names, dict):  # by number, which JSON makes a string
        numbered = {int(number): str(name) for number, name in names.items()}
        names = [numbered[number] for number in sorted(numbered)] if set(numbered) == set(range(len(names))) else None
    return None if names is None else tuple(map(str, names))


def own_classes(config: ModelConfig) -> Classes:
    """What a recipe's model tells apart by itself, whatever the data: as its weights do; 0 classes without a head.

    Args:
        config: the ``model`` section. Nothing is loaded: of ``init_from`` the head's shape is read, else of the named
            model its description.

    Raises:
        UserError: an unknown model or argument, or no weights at ``init_from``.
    """
    if config.init_from is not None:
        return stored_classes(weights_file(config.init_from)[0]) or Classes(0)
    with torch.device("meta"):
        model: Any = _create(config.name, {key: value for key, value in config.kwargs.items() if key != "pretrained"})
    names = output_names(model)
    return Classes(int(model.num_classes), names if names is not None and len(names) == model.num_classes else None)


def name_outputs(model: nn.Module, names: Sequence[str] | None) -> None:
    """Have a model know the names of its classes, where timm keeps them and its exports look for them; None: none."""
    facts: Any = getattr(model, "pretrained_cfg", None)
    if isinstance(facts, dict):
        facts.pop("label_names", None)
        if names is not None:
            facts.update(label_names=list(names), num_classes=len(names))


def _start_from(model: nn.Module, source: str, classes: Classes | None, new_head: bool) -> None:
    """Load weights to start from. The model's own head stays where theirs has another size, or if that is asked for.

    Raises:
        UserError: the weights do not fit, or their head tells as many classes of other names apart.
    """
    rows, (path, _) = None, weights_file(source)
    if not new_head:
        rows = _matching_rows(stored_classes(path), classes, f"model.init_from: the weights {source} know")
    own = [{key: value.clone() for key, value in head.state_dict().items()} for head in _heads(model)]
    load_weights(model, str(path), reset_head=True)
    if new_head:
        for head, before in zip(_heads(model), own, strict=True):
            head.load_state_dict(before)
    _reorder(model, rows)


def _check_pretrained(model: Any, classes: Classes, new_head: bool) -> None:
    """The same for weights that timm has loaded; it keeps a new head where theirs has another size.

    Raises:
        UserError: their head tells as many classes of other names apart.
    """
    if new_head:
        model.reset_classifier(classes.count)
        return
    stored = Classes(int(model.pretrained_cfg["num_classes"]), output_names(model))
    _reorder(model, _matching_rows(stored, classes, "model.kwargs.pretrained: timm's weights know"))


def _matching_rows(stored: Classes | None, classes: Classes | None, known: str) -> tuple[int, ...] | None:
    """Rows of a stored head in the order of the classes; None where they are in it, or the head is left out.

    Raises:
        UserError: the classes have other names.
    """
    if stored is None or classes is None or stored.count != classes.count:
        return None
    try:
        return match_classes(stored, classes, range(classes.count), known=known, ways_out=False).outputs
    except UserError as error:
        raise UserError(f"{error}; data.classes=new starts with a new head instead of theirs") from error


def _reorder(model: nn.Module, rows: tuple[int, ...] | None) -> None:
    if rows is not None:
        for head in _heads(model):
            head.load_state_dict({key: value[list(rows)] for key, value in head.state_dict().items()})


def _heads(model: Any) -> list[nn.Module]:
    """What tells a model's classes apart: two layers in one with a distillation token."""
    heads = model.get_classifier() if hasattr(model, "get_classifier") else ()
    return list(heads) if isinstance(heads, tuple | list) else [heads]


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
    # Without arguments an error of another type is a fault of the model, not of whoever named it.
    mistakes = _CALLED if ":" in name or set(kwargs) > {"num_classes"} else _NAMED
    try:
        return timm.create_model(name, **kwargs)
    except mistakes as error:
        raise UserError(f"model {name} cannot be created with model.kwargs={kwargs}: {error}") from error


def try_images(model: nn.Module, config: ModelConfig, input_shape: Sequence[int]) -> None:
    """One forward, on the CPU: a size that does not fit is a mistake in the config, to be told before any work.

    Raises:
        UserError: the model cannot take images [C, H, W] of such a shape. It is left in evaluation mode.
    """
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *input_shape))
    except (AssertionError, RuntimeError, ValueError) as error:
        message = " ".join(str(error).split())
        raise UserError(
            f"model {config.name} cannot take images of shape {list(input_shape)}: {message}; "
            "see model.kwargs (img_size, in_chans) and data.image_size"
        ) from error


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
        settings = need_classification(load_config(str(recorded)), source).model
    else:
        file, ema = weights_file(source, best=best, ema=ema)
        source, best, named = str(file), False, stored_model(file)
        if named is None:
            raise UserError(f"{source} does not say which model it is of: add --model NAME")
        settings = ModelConfig(name=named, kwargs=kwargs)
    return settings.name, open_recipe(settings, source, ema=ema, best=best)


def open_recipe(settings: ModelConfig, source: str, *, ema: bool = False, best: bool = False) -> nn.Module:
    """Build a recipe's model with as many classes as its weights have, and load them.

    Args:
        settings: the ``model`` section.
        source, ema, best: as for :func:`open_weights`.

    Returns:
        The model, in evaluation mode on the CPU; its outputs have the names that the weights know.

    Raises:
        UserError: nothing there, an unknown model, or weights that do not fit.
    """
    path, in_file = weights_file(source, best=best, ema=ema)
    classes = stored_classes(path) or Classes(0)  # without a head there is none
    network = create_model(settings, classes.count, init=False)
    load_weights(network, str(path), ema=in_file)
    name_outputs(network, classes.names)
    return network.eval()
