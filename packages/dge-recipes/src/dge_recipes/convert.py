"""A checkpoint's weights as a safetensors file, or as a folder that timm loads."""

import sys

from dge_recipes.commands.convert import main

if __name__ == "__main__":  # before PyTorch is imported, which reads then what the command line sets
    sys.exit(main())

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

import dge_models
from dge_recipes.checkpoints.atomic_files import write_file
from dge_recipes.checkpoints.stored_classes import weights_metadata
from dge_recipes.cli import check_target
from dge_recipes.errors import UserError
from dge_recipes.models import open_weights, output_names

__all__ = ["convert", "main"]


def convert(
    source: str,
    target: Path,
    *,
    model: str | None = None,
    kwargs: dict[str, Any] | None = None,
    ema: bool = False,
    best: bool = False,
    overwrite: bool = False,
) -> int:
    """Write a checkpoint's weights to a safetensors file, and with them the names of the classes that it knows.

    A target without an extension is a folder for ``timm.create_model("local-dir:TARGET", pretrained=True)``, see
    :func:`dge_models.save_pretrained`.

    Args:
        source: a weights file, a run folder or a checkpoint folder.
        target: the file or folder to write.
        model: name of the model known to timm; None: what the source says.
        kwargs: the model's arguments, beside the number of classes, which follows from the weights.
        ema: the averaged weights.
        best: of a run, the best checkpoint instead of the newest.
        overwrite: replace the target if it exists.

    Returns:
        The number of parameters.

    Raises:
        UserError: a damaged or foreign file, a model that does not fit, or a target that cannot be written.
    """
    folder = target.suffix == ""
    check_target("target", target, suffixes=() if folder else (".safetensors",), folder=folder)
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists: choose another name or add --overwrite")
    name, network = open_weights(source, model, kwargs or {}, ema=ema, best=best)
    names = output_names(network)
    if folder:
        try:
            dge_models.save_pretrained(network, target, label_names=names)
        except ValueError as error:
            raise UserError(f"target {target}: {error}") from error
    else:
        weights = {key: value.contiguous() for key, value in network.state_dict().items()}
        metadata = weights_metadata(names, network, model=name)
        write_file(target, lambda aside: save_file(weights, aside, metadata=metadata))
    return sum(parameter.numel() for parameter in network.parameters())
