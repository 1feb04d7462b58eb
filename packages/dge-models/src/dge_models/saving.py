"""Saving a model to a folder, or to a hub, from which ``timm.create_model`` gives it back."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from timm.models import filter_pretrained_cfg
from torch import Tensor, nn

from dge_models.creation import architecture_of, check_recreation, creation_arguments
from dge_models.families import find_family
from dge_models.model_card import model_card
from dge_models.routed import routed_blocks

__all__ = ["model_config", "push_to_hf_hub", "save_pretrained", "weights_metadata"]

_FILES = ("README.md", "config.json", "model.safetensors")


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    label_names: Sequence[str] | None = None,
    ratio: float | None = None,
) -> None:
    """Write a folder that ``timm.create_model(f"local-dir:{folder}", pretrained=True)`` loads.

    The model that it gives has the same weights, and with them the budget, the same fixed queries, modes, input size,
    normalisation and names of classes. The process that loads it has to import ``dge_models``. Rates of dropout and
    drop path are not stored, as timm does not; nor are dtype and device.

    The folder holds ``config.json``, ``model.safetensors`` and a ``README.md`` to go on with: what a page of the
    Hugging Face Hub holds, so that ``hf-hub:`` reads it too, and transformers' ``TimmWrapper``. It appears whole or not
    at all, and takes the place of an earlier one.

    Args:
        model: From ``timm.create_model`` or :func:`from_timm`, of this package or plain.
        folder: To write; new, empty or of an earlier call.
        label_names: The classes' names, in the order of the logits; None keeps those that the model knows.
        ratio: A mean MAC ratio that was measured, for the README.

    Raises:
        ValueError: `label_names` are not one per class, timm knows no name of the model, it was changed so that
            no arguments describe it, or the folder holds other files.
    """
    model, folder = _unwrapped(model), Path(folder)
    _check_folder(folder)
    config, twin = _config(model, label_names)
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.absolute().parent))
    try:
        card = model_card(model, twin, config, ratio)
        _write(made, model, config, card)
        _put_in_place(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def push_to_hf_hub(
    model: nn.Module,
    repo_id: str,
    *,
    label_names: Sequence[str] | None = None,
    ratio: float | None = None,
    commit_message: str = "Add model",
    token: str | None = None,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
) -> Any:
    """Upload what :func:`save_pretrained` writes to the Hugging Face Hub; a README that is there stays.

    Args:
        model: As in :func:`save_pretrained`.
        repo_id: Such as "me/my-model"; it is made where there is none.
        label_names: As in :func:`save_pretrained`.
        ratio: As in :func:`save_pretrained`.
        commit_message: Of the upload.
        token: Of the account; None takes that of the login.
        revision: Branch to upload to.
        private: Whether a new repository is.
        create_pr: Upload as a pull request.

    Returns:
        What the hub says of the commit.

    Raises:
        ValueError: As in :func:`save_pretrained`.
    """
    from huggingface_hub import HfApi  # timm needs it for the hub alone too

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save_pretrained(model, folder, label_names=label_names, ratio=ratio)
        api = HfApi(token=token, library_name="timm")
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if api.file_exists(repo_id=repo_id, filename="README.md", revision=revision):
            (folder / "README.md").unlink()
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )


def model_config(model: nn.Module, label_names: Sequence[str] | None = None) -> dict[str, Any]:
    """What ``config.json`` says beside a model's ``model.safetensors``, for timm's ``local-dir:`` and ``hf-hub:``.

    :func:`save_pretrained` writes both; this is for those who write weights themselves.

    Args:
        model: As in :func:`save_pretrained`.
        label_names: As in :func:`save_pretrained`.

    Returns:
        Values that JSON can hold.

    Raises:
        ValueError: As in :func:`save_pretrained`.
    """
    return _config(_unwrapped(model), label_names)[0]


def weights_metadata(model: nn.Module, label_names: Sequence[str] | None = None) -> dict[str, str]:
    """What a safetensors file of a model's weights says beside them; :func:`load_checkpoint` compares it.

    Args:
        model: With or without routed blocks.
        label_names: The classes' names, in the order of the logits; None leaves them out.

    Returns:
        ``format``; ``splits``, JSON of the split set or, where the routed blocks differ, of one per block; and
        ``label_names``, a JSON list.
    """
    metadata = {"format": "pt"}
    splits = [list(block.router.splits) for block in routed_blocks(model)]
    if splits:
        metadata["splits"] = json.dumps(splits[0] if all(own == splits[0] for own in splits) else splits)
    if label_names is not None:
        metadata["label_names"] = json.dumps(list(label_names))
    return metadata


def _unwrapped(model: Any) -> Any:
    """The module inside wrappers that add nothing: DDP, ``torch.compile``."""
    for name in ("_orig_mod", "module"):
        if isinstance(inner := getattr(model, "_modules", {}).get(name), nn.Module):
            return _unwrapped(inner)
    return model


def _config(model: Any, label_names: Sequence[str] | None) -> tuple[dict[str, Any], nn.Module]:
    """What config.json holds, and the model that timm makes from it, on the meta device."""
    architecture = architecture_of(model)
    arguments = creation_arguments(model)
    try:
        json.dumps(arguments)
    except TypeError as error:
        raise ValueError(f"model: its arguments {arguments} can't be stored as JSON: {error}") from error
    twin = check_recreation(model, arguments)
    described = _pretrained_config(model)
    stored_names = described.pop("label_names", None)
    names = stored_names if label_names is None else list(label_names)
    if names is not None and len(names) != model.num_classes:
        if label_names is not None:
            raise ValueError(f"label_names: got {len(names)}; expected one per class, {model.num_classes}")
        names = None  # of another head
    config: dict[str, Any] = {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
    }
    if isinstance(model.global_pool, str) and model.global_pool:
        config["global_pool"] = model.global_pool
    if names is not None:
        config["label_names"] = names
    descriptions = described.pop("label_descriptions", None)
    if names is not None and label_names is None and descriptions is not None:
        config["label_descriptions"] = descriptions
    # The number of classes is not among them: it stands above, and TimmWrapper gives it by itself.
    return {**config, "model_args": arguments, "pretrained_cfg": described}, twin


def _pretrained_config(model: Any) -> dict[str, Any]:
    """The data configuration and the names of layers, as they are for this model."""
    stored = {key: value for key, value in model.pretrained_cfg.items() if key != "state_dict"}
    config: dict[str, Any] = filter_pretrained_cfg(stored, remove_source=True, remove_null=True)
    for name in ("architecture", "label_offset"):
        config.pop(name, None)
    channels = next(module for module in model.modules() if isinstance(module, nn.Conv2d)).in_channels
    family = find_family(model)
    size = None if family is None else family.input_size(model)
    size = tuple(config["input_size"][1:]) if size is None else size
    if size != tuple(config["input_size"][1:]):
        config["pool_size"] = None
        config.pop("test_input_size", None)
    for name in ("test_input_size", "min_input_size"):
        if config.get(name):
            config[name] = [channels, *config[name][1:]]
    any_size = bool(getattr(model, "dynamic_img_size", False))
    fixed = config.get("fixed_input_size", False) and not any_size
    return {
        **config,
        "input_size": [channels, *size],
        "fixed_input_size": fixed,
        "custom_load": False,
        "num_classes": model.num_classes,
    }


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"folder: {folder} is a file; expected a folder")
    others = sorted(path.name for path in folder.iterdir() if path.name not in _FILES)
    if others:
        raise ValueError(
            f"folder: {folder} holds {', '.join(others[:3])}; expected a new or empty folder, or a saved model"
        )


def _write(folder: Path, model: Any, config: Mapping[str, Any], card: str) -> None:
    config_file = folder / "config.json"
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
    weights = folder / "model.safetensors"
    metadata = weights_metadata(model, config.get("label_names"))
    safetensors.torch.save_file(_plain_tensors(model.state_dict()), weights, metadata=metadata)
    mode = config_file.stat().st_mode  # safetensors and mkdtemp let nobody but the owner read
    weights.chmod(mode)
    folder.chmod(mode | (mode & 0o444) >> 2)
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def _plain_tensors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU with memory of their own, as safetensors wants them."""
    taken: set[int] = set()
    plain = {}
    for name, tensor in weights.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage()
        if memory.data_ptr() in taken or memory.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        taken.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor
    return plain


def _put_in_place(made: Path, folder: Path) -> None:
    if not folder.exists():
        made.rename(folder)
        return
    aside = made.with_name(f"{made.name}-old")
    folder.rename(aside)
    try:
        made.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise
    shutil.rmtree(aside)
