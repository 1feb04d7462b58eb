"""The demonstration: a dense and a dynamic model of handwritten digits, trained, compared and drawn."""

from dge_recipes.demo.run import run_demo

__all__ = ["run_demo"]
