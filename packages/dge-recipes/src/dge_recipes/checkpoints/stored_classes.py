"""What a file of weights says of its model: the names of its classes, in safetensors metadata, and the model's name."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import dge_models
from dge_recipes.classes import Classes
from dge_recipes.errors import UserError

__all__ = ["stored_classes", "stored_model", "weights_metadata"]

_LABEL_NAMES = "label_names"  # what timm calls them
_HEADS = ("head.weight", "fc.weight", "head.fc.weight", "classifier.weight")
_PREFIXES = ("module.", "_orig_mod.")  # of DDP and torch.compile


def weights_metadata(names: Sequence[str] | None, network: nn.Module | None = None, **facts: str) -> dict[str, str]:
    """Metadata for a safetensors file of weights.

    Args:
        names: of the model's outputs, None where they have none.
        network: whose weights they are, to say for which splits its routers are trained.
        facts: further entries.
    """
    named = {} if names is None else {_LABEL_NAMES: json.dumps(list(names))}
    general = {"format": "pt"} if network is None else dge_models.weights_metadata(network)
    return {**general, **facts, **named}


def stored_classes(path: Path) -> Classes | None:
    """How many outputs the model has that a file holds the weights of, and their names where the file has them.

    Args:
        path: a weights file of this project, of timm or of the method's authors.

    Returns:
        None where no head is found. Files of other projects, and of earlier versions, name no classes.

    Raises:
        UserError: it cannot be read, or has another number of names than of outputs.
    """
    facts = _read(path)
    metadata = facts.metadata
    count = next((shape[0] for key, shape in facts.shapes.items() if _plain(key) in _HEADS and shape), None)
    if _LABEL_NAMES not in metadata:
        return None if count is None else Classes(count)
    try:
        names = [str(name) for name in json.loads(metadata[_LABEL_NAMES])]
    except (ValueError, TypeError) as error:
        raise UserError(f"weights {path}: {_LABEL_NAMES} in its metadata is no list of names: {error}") from error
    if count is not None and len(names) != count:
        raise UserError(f"weights {path} name {len(names)} classes, but have {count} outputs")
    return Classes(len(names), tuple(names))


def stored_model(path: Path) -> str | None:
    """The name of the model that a file of the authors' says it is of; None where a file does not say.

    Raises:
        UserError: it cannot be read.
    """
    return _read(path).model


@dataclass(frozen=True)
class _Facts:
    """Of a file: shapes of the weights, metadata, and the model's name."""

    shapes: Mapping[str, Sequence[int]]
    metadata: Mapping[str, str]
    model: str | None = None


def _read(path: Path) -> _Facts:
    """No weight is read, except of a file that PyTorch wrote before version 1.6."""
    try:
        if path.suffix != ".safetensors":
            return _read_pickle(path)
        with safe_open(path, "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
            return _Facts(shapes, file.metadata() or {})
    except SafetensorError as error:
        reason = f"path: {path} is truncated or not a safetensors file ({error})"
        raise UserError(f"weights {path} cannot be loaded: {reason}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"weights {path} cannot be loaded: {error}") from error


def _read_pickle(path: Path) -> _Facts:
    content = dge_models.read_checkpoint(path, mmap=True)
    shapes = {
        key: list(value.shape)
        for weights in content.values()
        if isinstance(weights, dict)
        for key, value in weights.items()
        if isinstance(value, Tensor)
    }
    model = getattr(content.get("args"), "model", None)
    return _Facts(shapes, {}, model if isinstance(model, str) else None)


def _plain(key: str) -> str:
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key
