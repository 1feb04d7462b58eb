"""The training recipe: set up, train, evaluate, save."""

from dge_recipes.training.dry_run import dry_run
from dge_recipes.training.loop import train

__all__ = ["dry_run", "train"]
