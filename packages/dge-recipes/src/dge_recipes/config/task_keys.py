"""Which keys belong to which task: what is set for another one is a mistake, and told."""

from typing import Any

from dge_recipes.config.head import DETECTORS, SEGMENTERS
from dge_recipes.config.schema import Config
from dge_recipes.errors import UserError

__all__ = ["HEADS", "check_task", "foreign_keys", "need_classification"]

# The kinds of heads of the tasks that have some.
HEADS: dict[str, tuple[str, ...]] = {"detection": DETECTORS, "segmentation": SEGMENTERS}

# Keys of classification alone; None stands for a whole section.
_CLASSIFICATION: tuple[tuple[str, str | None], ...] = (
    ("mixing", None),
    ("distillation", None),
    ("train", "label_smoothing"),
    ("data", "classes"),
)


def foreign_keys(task: str) -> dict[str, Any]:
    """What a configuration of a task does not say, for pydantic's ``exclude``.

    Classification is the default, and its configurations are as they were before there were other tasks.
    """
    if task not in HEADS:
        return {"task": True, "head": True}
    return {section: True if key is None else {key} for section, key in _CLASSIFICATION}


def check_task(config: Config) -> None:
    """The data, the head and the keys that were set must be those of the task.

    Raises:
        UserError: they are those of another one.
    """
    task, served, kind = config.task, config.data.tasks, config.head.kind
    if task not in served:
        raise UserError(f"data.name={config.data.name} serves {' and '.join(served)}; got task={task}")
    if task not in HEADS:
        if "head" in config.model_fields_set:
            raise UserError(f"head: is for {' and '.join(HEADS)}; got it with task={task}")
        return
    if kind not in HEADS[task]:
        got = "null" if kind is None else kind
        raise UserError(f"head.kind: got {got} with task={task}, expected one of {', '.join(HEADS[task])}")
    for section, key in _CLASSIFICATION:
        given = config if key is None else getattr(config, section)
        if (key or section) in given.model_fields_set:
            name = section if key is None else f"{section}.{key}"
            raise UserError(f"{name}: is for classification; got it with task={task}, where it says nothing")


def need_classification(config: Config, source: str) -> Config:
    """The configuration itself, for what only a classifier can be used for.

    Args:
        config: that was recorded.
        source: where, for the error.

    Raises:
        UserError: it is of another task.
    """
    if config.task != "classification":
        raise UserError(f"{source} is of task={config.task}; expected a model of classification")
    return config
