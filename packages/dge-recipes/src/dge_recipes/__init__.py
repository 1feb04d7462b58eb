"""Training and evaluation of Dynamic Grained Encoder (DGE) vision transformers.

Command lines: ``dge-train``, ``dge-eval``, ``dge-benchmark``, ``dge-visualize``, ``dge-convert``, and
``python -m`` with ``dge_recipes.demo``, ``dge_recipes.study`` and ``dge_recipes.overhead``.
From Python: :func:`dge_recipes.config.load_config`, :func:`dge_recipes.training.train` and
:func:`dge_recipes.evaluation.evaluate` are what the command lines call.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("dge-recipes")
except PackageNotFoundError:  # a source tree on sys.path that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
