"""``dge-visualize``: where a model spends its queries, drawn over images."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dge_recipes.cli import check_target, run_command
from dge_recipes.errors import UserError

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

index.html holds its pictures inside: the one file can be sent or published as it is.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = _parser().parse_intermixed_args(arguments)
    return run_command("dge-visualize", lambda: _run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "dge-visualize",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a run, a checkpoint or a weights file")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the pictures")
    parser.add_argument("--config", metavar="NAME_OR_FILE", help="recipe of the weights; a run knows its own")
    parser.add_argument("--layers", metavar="N,N", help="routed layers to draw, from 1 as in the picture; default: all")
    parser.add_argument("--ema", action="store_true", help="the averaged weights")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="change a key of the recipe")
    return parser


def _run(options: argparse.Namespace) -> None:
    layers = _layers(options.layers)
    check_target("--output", options.output, folder=True)
    # Imported late: --help answers at once.
    from dge_recipes.checkpoints.folder import write_text
    from dge_recipes.checkpoints.weights import open_recipe
    from dge_recipes.evaluation.subject import find_subject
    from dge_recipes.models import is_routed
    from dge_recipes.visualizing.images import find_images
    from dge_recipes.visualizing.overlays import draw_overlays
    from dge_recipes.visualizing.page import html_page

    paths = find_images(options.images)
    targets = [options.output / f"{name}.png" for name in _names(paths)]
    images = {path.resolve() for path in paths}
    for path, target in zip(paths, targets, strict=True):
        if target.resolve() in images:
            raise UserError(f"--output {options.output}: the picture of {path} would replace the image {target}")
    subject = find_subject(options.checkpoint, options.config, options.set)
    model = open_recipe(subject.config.model, options.checkpoint, ema=options.ema)
    if not is_routed(model):
        raise UserError(f"{subject.config.model.name} has no routers, so there is nothing to draw")
    try:
        overlays = draw_overlays(model, paths, subject.config, layers)
    except (IndexError, RuntimeError) as error:
        raise UserError(f"the images cannot be drawn: {' '.join(str(error).split())}") from error
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        for overlay, target in zip(overlays, targets, strict=True):
            overlay.picture.save(target)
            print(f"{target}  {overlay.caption}")
        if any(Path(each).is_dir() for each in options.images):
            page = options.output / "index.html"
            text = html_page(overlays, f"{subject.config.model.name}: queries spent")
            # File names may hold bytes that are no text.
            write_text(page, text.encode("utf-8", "backslashreplace").decode("utf-8"))
            print(page)
    except OSError as error:
        raise UserError(f"cannot write to {options.output}: {error}") from error


def _layers(text: str | None) -> list[int] | None:
    """Places from 0 of layers that a user counts from 1, as the pictures do."""
    try:
        return None if text is None else [int(part) - 1 for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--layers {text!r}: expected whole numbers with commas between, for example 1,6,12") from error


def _names(paths: Sequence[Path]) -> list[str]:
    """A name for each picture; images of the same name in different folders stay apart."""
    names: list[str] = []
    for path in paths:
        name, number = path.stem, 2
        while name in names:
            name, number = f"{path.stem}_{number}", number + 1
        names.append(name)
    return names


if __name__ == "__main__":
    sys.exit(main())
