"""Another name of :func:`dge_recipes.train.train` and :func:`dge_recipes.dry_run.dry_run`."""

from dge_recipes.dry_run import dry_run
from dge_recipes.train import train

__all__ = ["dry_run", "train"]
