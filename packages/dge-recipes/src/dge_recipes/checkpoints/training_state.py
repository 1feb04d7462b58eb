"""What a run needs to continue, as safetensors and JSON: nothing in it is ever unpickled.

PyTorch's distributed state-dict functions name optimiser state by parameter and gather sharded models, so
one checkpoint fits one process, DDP and FSDP alike.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import dge_models
from dge_recipes.checkpoints.store import EMA_FILE, MODEL_FILE
from dge_recipes.checkpoints.stored_classes import weights_metadata
from dge_recipes.errors import UserError

__all__ = ["DATA_FILE", "Stateful", "capture_state", "read_progress", "restore_state"]

DATA_FILE = "data.json"

_OPTIMIZER_FILE = "optimizer.safetensors"
_STATE_FILE = "state.json"
_TIMM_FILE = "config.json"
_TIMM_CONFIGS: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()
_OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True)
_MARK = "__tensor__"  # stands in the JSON where a tensor of the safetensors file belongs


class Stateful(Protocol):
    """An object whose state is numbers, strings, lists and dicts."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Take a state back."""


def capture_state(
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    registered: Mapping[str, Stateful],
    *,
    data: Mapping[str, Any] | None = None,
    label_names: Sequence[str] | None = None,
) -> Callable[[Path], None]:
    """Gather a run's state. Every process must call it; only one writes.

    Args:
        model: the network, without wrappers.
        ema: the averaged network, or None.
        optimizer: over the model's parameters.
        registered: everything else that has state: progress, schedule, loss scaler ...
        data: what to record of the data, as JSON holds it.
        label_names: of the network's outputs.

    Returns:
        A function that writes the state into a folder.
    """
    weights = get_model_state_dict(model, options=_OPTIONS)
    average = None if ema is None else get_model_state_dict(ema, options=_OPTIONS)
    tensors: dict[str, Tensor] = {}
    optimizer_state = _split(get_optimizer_state_dict(model, optimizer, options=_OPTIONS), "", tensors)
    state = {name: item.state_dict() for name, item in registered.items()}
    metadata = weights_metadata(label_names, model)
    described = _timm_config(model, label_names)

    def write(folder: Path) -> None:
        save_file(_plain(weights), folder / MODEL_FILE, metadata=metadata)
        if described is not None:
            (folder / _TIMM_FILE).write_text(described, encoding="utf-8")
        if average is not None:
            save_file(_plain(average), folder / EMA_FILE, metadata=metadata)
        save_file(_plain(tensors), folder / _OPTIMIZER_FILE)
        text = json.dumps({"registered": state, "optimizer": optimizer_state})
        (folder / _STATE_FILE).write_text(text, encoding="utf-8")
        if data is not None:
            (folder / DATA_FILE).write_text(json.dumps(data), encoding="utf-8")

    return write


def _timm_config(model: nn.Module, label_names: Sequence[str] | None) -> str | None:
    """What makes a checkpoint's folder one that timm loads: ``timm.create_model("local-dir:FOLDER", pretrained=True)``.

    None of a model that timm does not know, or not in this shape. Made once for a model, and without drawing numbers.
    """
    if model not in _TIMM_CONFIGS:
        try:
            with torch.random.fork_rng(devices=[]):
                config = json.dumps(dge_models.model_config(model, label_names), indent=2) + "\n"
        except (AttributeError, StopIteration, ValueError):
            _TIMM_CONFIGS[model] = None
        else:
            _TIMM_CONFIGS[model] = config
    return _TIMM_CONFIGS[model]


def restore_state(
    folder: Path,
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    registered: Mapping[str, Stateful],
) -> None:
    """Put a state that :func:`capture_state` wrote back, in place. Every process calls it.

    Raises:
        UserError: it is the state of another model, optimiser or kind of run.
    """
    try:
        content = json.loads((folder / _STATE_FILE).read_text(encoding="utf-8"))
        set_model_state_dict(model, {**load_file(folder / MODEL_FILE)}, options=_OPTIONS)
        if ema is not None:
            set_model_state_dict(ema, {**load_file(folder / EMA_FILE)}, options=_OPTIONS)
        optimizer_state = _join(content["optimizer"], load_file(folder / _OPTIMIZER_FILE))
        set_optimizer_state_dict(model, optimizer, optimizer_state, options=_OPTIONS)
        _restore_tuples(optimizer)
        for name, item in registered.items():
            item.load_state_dict(content["registered"][name])
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        message = " ".join(str(error).split())[:300]
        raise UserError(f"checkpoint {folder} does not fit this run: {message}") from error


def read_progress(folder: Path) -> dict[str, Any]:
    """The registered ``progress`` of a checkpoint, without loading it.

    Raises:
        UserError: the file is not a training state.
    """
    try:
        progress: dict[str, Any] = json.loads((folder / _STATE_FILE).read_text(encoding="utf-8"))["registered"][
            "progress"
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {folder} holds no training state: {error}") from error
    return progress


def _restore_tuples(optimizer: torch.optim.Optimizer) -> None:
    """Options such as betas are tuples, which JSON does not know."""
    for group in optimizer.param_groups:
        lists = {name: value for name, value in group.items() if name != "params" and isinstance(value, list)}
        group.update({name: tuple(value) for name, value in lists.items()})


def _plain(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Contiguous tensors with memory of their own, as safetensors wants them."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A nested state with its tensors moved into `tensors` and a mark left in their place."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {_MARK: path}
    if isinstance(value, dict):
        return {name: _split(inner, f"{path}/{name}", tensors) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_split(inner, f"{path}/{index}", tensors) for index, inner in enumerate(value)]
    return value


def _join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`_split`, tuples having become lists."""
    if isinstance(value, dict):
        if _MARK in value:
            return tensors[value[_MARK]]
        return {name: _join(inner, tensors) for name, inner in value.items()}
    if isinstance(value, list):
        return [_join(inner, tensors) for inner in value]
    return value
