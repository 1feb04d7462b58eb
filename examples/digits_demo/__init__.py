"""The demonstration: a dense and a dynamic model of handwritten digits, trained, compared and drawn."""

from examples.digits_demo.run import run_demo

__all__ = ["run_demo"]
