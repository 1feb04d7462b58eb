"""``dge-convert``: a checkpoint's weights as a safetensors file, or as a folder that timm loads."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dge_recipes.cli import command_parser, run_command
from dge_recipes.errors import UserError

__all__ = ["main"]

_DESCRIPTION = """\
Write the weights of a checkpoint, under timm's names, to a safetensors file, or to a folder that timm loads.

  dge-convert dge.pth dge.safetensors                     a checkpoint of the method's authors
  dge-convert dge.pth dge.safetensors --ema               its averaged weights
  dge-convert runs/digits digits.safetensors              the newest checkpoint of a run of dge-train
  dge-convert runs/digits digits                          the same as a folder: timm.create_model("local-dir:digits",
                                                          pretrained=True), also for a page of the Hugging Face Hub
  dge-convert other.pth other.safetensors --model deit_tiny_patch16_256
                                                          a file that does not say which model it is of

The weights are loaded into the model and so checked; nothing in the file is run. --model takes any name that timm
knows, and model arguments follow it as key=value, for example img_size=224.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = _parser().parse_intermixed_args(arguments)
    return run_command("dge-convert", lambda: _run(options), whole=options.traceback)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("dge-convert", _DESCRIPTION)
    parser.add_argument("source", help="a weights file (.pth, .safetensors), a run folder or a checkpoint folder")
    parser.add_argument("target", type=Path, help="the .safetensors file to write, or without an extension a folder")
    parser.add_argument("--model", metavar="NAME", help="the model; by default what the source says")
    parser.add_argument("--ema", action="store_true", help="the averaged weights")
    parser.add_argument("--best", action="store_true", help="of a run, the best checkpoint instead of the newest")
    parser.add_argument("--overwrite", action="store_true", help="replace the target")
    parser.add_argument("kwargs", nargs="*", default=[], metavar="key=value", help="arguments of --model")
    return parser


def _run(options: argparse.Namespace) -> None:
    # Imported late: --help answers at once.
    from dge_recipes.config.loading import parse_yaml
    from dge_recipes.convert import convert

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
