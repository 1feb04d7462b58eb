"""Accuracy, cost and speed of a model on held-out images."""

from dge_recipes.evaluation.accuracy import Evaluation, evaluate
from dge_recipes.evaluation.speed import first_images, images_per_second, machine_facts, measure_speed, time_forwards
from dge_recipes.evaluation.table import Row, markdown_table

__all__ = [
    "Evaluation",
    "Row",
    "evaluate",
    "first_images",
    "images_per_second",
    "machine_facts",
    "markdown_table",
    "measure_speed",
    "time_forwards",
]
