"""``python -m examples.digits_demo``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dge_recipes.cli import command_parser, run_command

__all__ = ["main"]

_DESCRIPTION = """\
Train a small vision transformer on scikit-learn's handwritten digits, convert it to a Dynamic Grained
Encoder, fine-tune that, evaluate both on the 360 held-out digits, time them in alternation, and draw where
the dynamic model spends its queries. About 6 minutes on 2 CPU cores.

The output folder gets summary.json, granularity.png and the two runs, dense/ and dge/.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = _parser().parse_intermixed_args(arguments)
    return run_command(
        "examples.digits_demo", lambda: _run(options), "start again with --overwrite", whole=options.traceback
    )


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("examples.digits_demo", _DESCRIPTION)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier demo left there")
    parser.add_argument("--seed", type=int, default=0, help="of everything random; default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys to change in both recipes")
    return parser


def _run(options: argparse.Namespace) -> None:
    # Imported late: --help answers at once.
    from examples.digits_demo.run import run_demo

    run_demo(options.output, seed=options.seed, overwrite=options.overwrite, overrides=options.overrides)


if __name__ == "__main__":
    sys.exit(main())
