"""Where photographs come from: every kind of storage as a list of (image, label)."""

from dge_recipes.data.sources.opening import open_source
from dge_recipes.data.sources.source import ImageSource

__all__ = ["ImageSource", "open_source"]
