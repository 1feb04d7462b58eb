"""``dge-eval``: accuracy, MACs and speed of a checkpoint on held-out images."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dge_recipes.checkpoints import run_config
from dge_recipes.cli import run_command
from dge_recipes.config import Config, load_config
from dge_recipes.errors import UserError

__all__ = ["main"]

_DESCRIPTION = """\
Evaluate a checkpoint on the held-out images and print a row like the published table's.

  dge-eval runs/digits                                    the newest checkpoint of a run of dge-train
  dge-eval runs/digits --best                             its best one
  dge-eval dge.pth --config deit_dge_tiny_256 data.root=/data/imagenet
                                                          a weights file (ours, timm's or the authors')
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = _parser().parse_intermixed_args(arguments)
    return run_command("dge-eval", lambda: _run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "dge-eval",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", help="a run folder, a checkpoint folder or a weights file")
    parser.add_argument(
        "--config", metavar="NAME_OR_FILE", help="recipe of the model and the data; a run knows its own"
    )
    parser.add_argument("--best", action="store_true", help="of a run, the best checkpoint instead of the newest")
    parser.add_argument("--ema", action="store_true", help="the averaged weights")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys to change, for example data.root=/data")
    return parser


def _run(options: argparse.Namespace) -> None:
    config = _config(options)
    # Imported late: --help answers at once.
    from dge_recipes.evaluation.report import evaluate_checkpoint

    evaluate_checkpoint(config, options.checkpoint, best=options.best, ema=options.ema, output=options.json)


def _config(options: argparse.Namespace) -> Config:
    recorded = run_config(options.checkpoint)
    if options.config is None and recorded is None:
        raise UserError(
            f"{options.checkpoint} belongs to no run that recorded its config: say which recipe, --config NAME_OR_FILE"
        )
    return load_config(options.config or str(recorded), options.overrides)


if __name__ == "__main__":
    sys.exit(main())
