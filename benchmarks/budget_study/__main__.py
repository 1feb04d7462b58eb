"""``python -m benchmarks.budget_study``."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from dge_recipes.cli import comma_list, command_parser, run_command
from dge_recipes.errors import UserError

__all__ = ["main"]

_DESCRIPTION = """\
Train a dense model and its conversions to several budgets, each with several seeds, and compare them.

  python -m benchmarks.budget_study --output runs/study                handwritten digits: all rows, seeds 0, 1 and 2
  python -m benchmarks.budget_study --output runs/trial --seeds 0 --epochs 1
                                                                 a trial of the whole
  python -m benchmarks.budget_study --output runs/study --rows dge_loss_0.5
                                                                 the dense model and one other row
  python -m benchmarks.budget_study --output runs/shapes --data shapes --minutes 10
                                                                 drawn shapes at 256 px, for a GPU, with timing

Rows: dense; dense_longer, trained on for the epochs that conversions are fine-tuned; dge_loss_R, the paper's penalty
aiming for the MAC ratio R; dge_controller_R, the controller that meets it; dge_random, one model trained for all
ratios and set to each afterwards. The folder gets study.md, study.json and study.png, with --timing pictures over time
too. Start the same command again to continue: finished runs are not repeated. Precision is Accelerate's choice, on a
GPU ACCELERATE_MIXED_PRECISION=bf16.
"""
_DATA = ("digits", "shapes")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = _parser().parse_intermixed_args(arguments)
    return run_command(
        "benchmarks.budget_study",
        lambda: _run(options),
        "start the same command again to continue",
        whole=options.traceback,
    )


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.budget_study", _DESCRIPTION)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the study's folder")
    parser.add_argument("--data", choices=_DATA, default="digits", help="default: %(default)s")
    parser.add_argument("--seeds", metavar="N,N", help="default: 0,1,2; for shapes 0")
    parser.add_argument("--epochs", type=int, metavar="N", help="of every run, for a trial; default: the recipes'")
    parser.add_argument("--rows", default="", metavar="NAME,NAME", help="rows beside the dense one; default: all")
    parser.add_argument(
        "--timing",
        action=argparse.BooleanOptionalAction,
        help="tell times of training and inference, for an idle machine; default: for shapes, not for digits",
    )
    parser.add_argument("--minutes", type=float, metavar="N", help="stop after so many, saving the run under way")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys to change in every run")
    return parser


def _run(options: argparse.Namespace) -> None:
    seeds = None if options.seeds is None else comma_list("--seeds", options.seeds, int, "0,1,2")
    if options.epochs is not None and options.epochs < 1:
        raise UserError(f"--epochs {options.epochs}: expected at least 1")
    if options.minutes is not None and not 0 < options.minutes < math.inf:
        raise UserError(f"--minutes {options.minutes:g}: expected a number above 0")
    # Imported late: --help answers at once.
    from benchmarks.budget_study.plan import STUDIES, choose_variants
    from benchmarks.budget_study.report import Finding, to_markdown
    from benchmarks.budget_study.running import run_study

    study = STUDIES[options.data]
    content = run_study(
        options.output,
        choose_variants([part for part in options.rows.split(",") if part], study),
        study.seeds if seeds is None else seeds,
        options.epochs,
        options.overrides,
        study=study,
        timing=study.timing if options.timing is None else options.timing,
        minutes=options.minutes,
    )
    print(to_markdown([Finding(**run) for run in content["runs"]]))
    print(f"{options.output / 'study.png'}, {options.output / 'study.json'}")


if __name__ == "__main__":
    sys.exit(main())
