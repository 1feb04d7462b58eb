"""The training recipe: set up, train, evaluate, save."""

from dge_recipes.training.loop import train

__all__ = ["train"]
