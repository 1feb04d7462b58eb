"""``python -m dge_recipes.demo``: the demonstration, which lives in a checkout's ``examples/digits_demo``."""

import sys
from collections.abc import Sequence

from dge_recipes.cli import run_command
from dge_recipes.errors import UserError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    try:
        from examples.digits_demo.__main__ import main as run_demo  # from the folder that the command is started in
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("examples"):
            raise
        return run_command("dge_recipes.demo", _explain)
    return run_demo(arguments)


def _explain() -> None:
    raise UserError("the demo is in the repository's folder examples/digits_demo: start it in the root of a checkout")


if __name__ == "__main__":
    sys.exit(main())
