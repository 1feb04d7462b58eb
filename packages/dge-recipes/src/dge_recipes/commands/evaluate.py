"""``dge-eval``: accuracy, MACs and speed of a model on held-out images."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dge_recipes.cli import check_target, comma_list, command_parser, run_command
from dge_recipes.errors import UserError

__all__ = ["main"]

_DESCRIPTION = """\
Evaluate a model on the held-out images and print a row like the published table's, the published one below it.
A detector gets COCO's average precisions, a segmenter its mean intersection over union, and both the MACs of backbone,
neck and head apart.

  dge-eval runs/digits                                    the newest checkpoint of a run of dge-train
  dge-eval runs/digits --best                             its best one
  dge-eval runs/digits --budget 0.4,0.5,0.7               the same weights at several budgets: a table and a picture
  dge-eval dge.pth data.root=/data/imagenet               a checkpoint of the method's authors
  dge-eval mine.safetensors --config deit_dge_tiny_256 data.root=/data/imagenet
                                                          bare weights, and the recipe that they fit
  dge-eval FOLDER data.root=/data/imagenet                a saved model, from dge-convert, dge-compress or timm
  dge-eval deit_small_patch16_224.fb_in1k data.root=/data/imagenet
                                                          a model of timm with its own weights and preprocessing
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = _parser().parse_intermixed_args(arguments)
    return run_command("dge-eval", lambda: _run(options), whole=options.traceback)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("dge-eval", _DESCRIPTION)
    parser.add_argument(
        "checkpoint", help="a run folder, a checkpoint folder, a weights file, a saved model, or a model name of timm"
    )
    parser.add_argument(
        "--config", metavar="NAME_OR_FILE", help="recipe of the model and the data; a run knows its own"
    )
    parser.add_argument("--best", action="store_true", help="of a run, the best checkpoint instead of the newest")
    parser.add_argument("--ema", action="store_true", help="the averaged weights")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file too")
    parser.add_argument(
        "--budget", metavar="RATIOS", default="", help="MAC ratios to set and evaluate, for example 0.4,0.5,0.7"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="where --budget draws (.png or .svg); default: tradeoff.png"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="keys to change, for example data.root=/data"
    )
    return parser


def _run(options: argparse.Namespace) -> None:
    budgets = comma_list("--budget", options.budget, float, "0.4,0.5,0.7") if options.budget else []
    for budget in budgets:
        if not 0 < budget <= 1:
            raise UserError(f"--budget {options.budget!r}: got {budget:g}, expected MAC ratios above 0 and at most 1")
    if options.json is not None:
        check_target("--json", options.json)
    if options.plot is not None and not budgets:
        raise UserError("--plot draws what --budget evaluates; add --budget, for example 0.4,0.5,0.7")
    plot = options.plot or Path("tradeoff.png")
    if budgets:
        check_target("--plot", plot, suffixes=(".png", ".svg"))
    # Imported late: --help answers at once.
    from dge_recipes.evaluate import evaluate_checkpoint
    from dge_recipes.evaluation.target import find_target

    evaluate_checkpoint(
        find_target(options.checkpoint, options.config, options.overrides),
        best=options.best,
        ema=options.ema,
        budgets=budgets,
        output=options.json,
        plot=plot,
        tell=print,
    )
