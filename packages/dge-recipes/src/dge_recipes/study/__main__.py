"""``python -m dge_recipes.study``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dge_recipes.cli import run_command
from dge_recipes.errors import UserError

__all__ = ["main"]

_DESCRIPTION = """\
Train the digits' dense model and its conversions to several budgets, each with several seeds, and compare them.

  python -m dge_recipes.study --output runs/study                    all rows, seeds 0, 1 and 2
  python -m dge_recipes.study --output runs/trial --seeds 0 --epochs 1
                                                                     a trial of the whole
  python -m dge_recipes.study --output runs/study --rows dge_loss_0.5
                                                                     the dense model and one other row

Rows: dense; dense_longer, trained on for the epochs that conversions are fine-tuned; dge_loss_R, the paper's penalty
aiming for the MAC ratio R; dge_controller_R, the controller that meets it; dge_random, one model trained for all
ratios and set to each afterwards. The folder gets study.md, study.json and study.png. Start the same command again to
continue: finished runs are not repeated.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = _parser().parse_intermixed_args(arguments)
    return run_command("dge_recipes.study", lambda: _run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "dge_recipes.study",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the study's folder")
    parser.add_argument("--seeds", default="0,1,2", metavar="N,N", help="default: %(default)s")
    parser.add_argument("--epochs", type=int, metavar="N", help="of every run, for a trial; default: the recipes'")
    parser.add_argument("--rows", default="", metavar="NAME,NAME", help="rows beside the dense one; default: all")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys to change in every run")
    return parser


def _run(options: argparse.Namespace) -> None:
    try:
        seeds = [int(part) for part in options.seeds.split(",")]
    except ValueError as error:
        raise UserError(f"--seeds {options.seeds!r}: expected whole numbers with commas between") from error
    if options.epochs is not None and options.epochs < 1:
        raise UserError(f"--epochs {options.epochs}: expected at least 1")
    # Imported late: --help answers at once.
    from dge_recipes.study.plan import choose_variants
    from dge_recipes.study.report import Finding, to_markdown
    from dge_recipes.study.running import run_study

    variants = choose_variants([part for part in options.rows.split(",") if part])
    content = run_study(options.output, variants, seeds, options.epochs, options.overrides)
    print(to_markdown([Finding(**run) for run in content["runs"]]))
    print(f"{options.output / 'study.png'}, {options.output / 'study.json'}")


if __name__ == "__main__":
    sys.exit(main())
