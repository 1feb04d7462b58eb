"""Training and evaluation of Dynamic Grained Encoder (DGE) vision transformers.

Command lines: ``dge-train``, ``dge-eval``, ``dge-benchmark``, ``dge-visualize``, ``dge-convert`` and
``dge-compress``.
From Python: :func:`dge_recipes.config.load_config`, :func:`dge_recipes.train.train` and
:func:`dge_recipes.evaluation.evaluate` are what the command lines call.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("dge-recipes")
except PackageNotFoundError:  # a source tree on sys.path that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
