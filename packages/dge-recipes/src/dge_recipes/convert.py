"""``dge-convert``: a checkpoint's weights as a safetensors file that nothing has to be unpickled from."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dge_recipes.cli import check_target, run_command
from dge_recipes.errors import UserError

__all__ = ["convert", "main"]

_DESCRIPTION = """\
Write the weights of a checkpoint, under timm's names, to a safetensors file.

  dge-convert dge.pth dge.safetensors                     a checkpoint of the method's authors
  dge-convert dge.pth dge.safetensors --ema               its averaged weights
  dge-convert runs/digits digits.safetensors              the newest checkpoint of a run of dge-train
  dge-convert other.pth other.safetensors --model deit_tiny_patch16_256
                                                          a file that does not say which model it is of

The weights are loaded into the model and so checked; nothing in the file is run. --model takes any name that timm
knows, and model arguments follow it as key=value, for example img_size=224.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = _parser().parse_intermixed_args(arguments)
    return run_command("dge-convert", lambda: _run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "dge-convert",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", help="a weights file (.pth, .safetensors), a run folder or a checkpoint folder")
    parser.add_argument("target", type=Path, help="the .safetensors file to write")
    parser.add_argument("--model", metavar="NAME", help="the model; by default what the source says")
    parser.add_argument("--ema", action="store_true", help="the averaged weights")
    parser.add_argument("--best", action="store_true", help="of a run, the best checkpoint instead of the newest")
    parser.add_argument("--overwrite", action="store_true", help="replace the target")
    parser.add_argument("kwargs", nargs="*", default=[], metavar="key=value", help="arguments of --model")
    return parser


def _run(options: argparse.Namespace) -> None:
    from dge_recipes.config.yaml_values import parse_yaml

    kwargs: dict[str, Any] = {}
    for argument in options.kwargs:
        key, equals, text = argument.partition("=")
        if not equals:
            raise UserError(f"model argument {argument!r} is not of the form key=value")
        kwargs[key] = parse_yaml(text, f"the value in {argument!r}")
    count = convert(
        options.source,
        options.target,
        model=options.model,
        kwargs=kwargs,
        ema=options.ema,
        best=options.best,
        overwrite=options.overwrite,
    )
    print(f"{options.target}: {count / 1e6:.2f} M parameters")


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
    """Write a checkpoint's weights to a safetensors file.

    Args:
        source: a weights file, a run folder or a checkpoint folder.
        target: the file to write.
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
    from safetensors.torch import save_file

    from dge_recipes.checkpoints.folder import write_file
    from dge_recipes.checkpoints.weights import open_weights

    check_target("target", target, suffixes=(".safetensors",))
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists: choose another name or add --overwrite")
    name, network = open_weights(source, model, kwargs or {}, ema=ema, best=best)
    weights = {key: value.contiguous() for key, value in network.state_dict().items()}
    write_file(target, lambda aside: save_file(weights, aside, metadata={"format": "pt", "model": name}))
    return sum(parameter.numel() for parameter in network.parameters())


if __name__ == "__main__":
    sys.exit(main())
