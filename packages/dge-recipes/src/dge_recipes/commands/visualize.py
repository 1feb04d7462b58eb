"""``dge-visualize``: where a model spends its queries, drawn over images."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dge_recipes.cli import check_target, comma_list, command_parser, run_command

__all__ = ["main"]

_DESCRIPTION = """\
Draw over images which regions a DGE model gives many queries (orange) and which few (blue), layer by layer.

  dge-visualize cat.jpg dog.jpg --checkpoint runs/deit_dge_tiny_256 --output pictures
                                                          cat.png and dog.png in the folder pictures
  dge-visualize photos/ --checkpoint runs/deit_dge_tiny_256 --output pictures
                                                          a picture per photo, and index.html with all of them
  dge-visualize cat.jpg --checkpoint dge.pth --config deit_dge_tiny_256 --output pictures
                                                          a weights file, and the recipe that it fits
  dge-visualize cat.jpg --checkpoint runs/x --layers 1,6,12 --output pictures
                                                          three of the layers

Of a detector or segmenter the picture shows what it found: boxes and masks, or the class of every pixel, and beside
it the mean over the layers.

index.html holds its pictures inside: the one file can be sent or published as it is.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = _parser().parse_intermixed_args(arguments)
    return run_command("dge-visualize", lambda: _run(options), whole=options.traceback)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("dge-visualize", _DESCRIPTION)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a run, a checkpoint or a weights file")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the pictures")
    parser.add_argument("--config", metavar="NAME_OR_FILE", help="recipe of the weights; a run knows its own")
    parser.add_argument("--layers", metavar="N,N", help="routed layers to draw, from 1 as in the picture; default: all")
    parser.add_argument("--ema", action="store_true", help="the averaged weights")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="change a key of the recipe")
    return parser


def _run(options: argparse.Namespace) -> None:
    # A user counts layers from 1, as the pictures do.
    numbers = None if options.layers is None else comma_list("--layers", options.layers, int, "1,6,12")
    layers = None if numbers is None else [number - 1 for number in numbers]
    check_target("--output", options.output, folder=True)
    # Imported late: --help answers at once.
    from dge_recipes.evaluation.target import find_target
    from dge_recipes.visualize import find_images, name_pictures, visualize, write_pictures

    paths = find_images(options.images)
    pictures = name_pictures(paths, options.output)
    target = find_target(options.checkpoint, options.config, options.set)
    overlays = visualize(target, paths, ema=options.ema, layers=layers)
    page = options.output / "index.html" if any(Path(each).is_dir() for each in options.images) else None
    write_pictures(overlays, pictures, page, f"{target.config.model.name}: queries spent")
    for overlay, picture in zip(overlays, pictures, strict=True):
        print(f"{picture}  {overlay.caption}")
    if page is not None:
        print(page)
