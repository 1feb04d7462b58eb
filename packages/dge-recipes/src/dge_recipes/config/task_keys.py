"""Which keys belong to which task: what is set for another one is a mistake, and told."""

from typing import Any, get_args

from dge_recipes.config.head import DETECTORS, SEGMENTERS
from dge_recipes.config.schema import Config
from dge_recipes.errors import UserError

__all__ = ["HEADS", "check_distillation", "check_task", "foreign_keys", "need_classification"]

# The kinds of heads of the tasks that have some.
HEADS: dict[str, tuple[str, ...]] = {"detection": DETECTORS, "segmentation": SEGMENTERS}

_TASKS: tuple[str, ...] = get_args(Config.model_fields["task"].annotation)
_CLASSIFICATION, _DISTILLATION = "classification", "distillation"

# Keys of some tasks alone; None stands for a whole section.
_OWN: tuple[tuple[str, str | None, tuple[str, ...]], ...] = (
    ("head", None, tuple(HEADS)),
    ("mixing", None, (_CLASSIFICATION,)),
    ("distillation", None, (_CLASSIFICATION,)),
    ("train", "label_smoothing", (_CLASSIFICATION,)),
    ("data", "classes", (_CLASSIFICATION,)),
    ("data", "num_classes", tuple(task for task in _TASKS if task != _DISTILLATION)),
    ("student", None, (_DISTILLATION,)),
)


def foreign_keys(task: str) -> dict[str, Any]:
    """What a configuration of a task does not say, for pydantic's ``exclude``.

    Classification is the default, and its configurations are as they were before there were other tasks.
    """
    foreign: dict[str, Any] = {"task": True} if task == _CLASSIFICATION else {}
    for section, key, tasks in _OWN:
        if task in tasks:
            continue
        if key is None:
            foreign[section] = True
        else:
            foreign.setdefault(section, set()).add(key)
    return foreign


def check_task(config: Config) -> None:
    """The data, the head and the keys that were set must be those of the task.

    Raises:
        UserError: they are those of another one.
    """
    task, served, kind = config.task, config.data.tasks, config.head.kind
    if task not in served:
        raise UserError(f"data.name={config.data.name} serves {' and '.join(served)}; got task={task}")
    if task in HEADS and kind not in HEADS[task]:
        got = "null" if kind is None else kind
        raise UserError(f"head.kind: got {got} with task={task}, expected one of {', '.join(HEADS[task])}")
    for section, key, tasks in _OWN:
        given = config if key is None else getattr(config, section)
        if task not in tasks and (key or section) in given.model_fields_set:
            name = section if key is None else f"{section}.{key}"
            raise UserError(f"{name}: is for {' and '.join(tasks)}; got it with task={task}, where it says nothing")
    if task != _DISTILLATION:
        if config.budget.kind == "set":
            raise UserError(
                f"budget.kind=set is for {_DISTILLATION}, whose routers are fitted; got it with task={task}"
            )
        return
    if "pretrained" in config.model.kwargs:
        raise UserError(
            "model.kwargs.pretrained: got it with task=distillation, expected none: the weights are those of "
            "model.init_from, or without it the named model's own"
        )
    check_distillation(config)


def check_distillation(config: Config) -> None:
    """What a recipe of distillation needs, and what it has not been proved with.

    Raises:
        UserError: something is missing, or asked for in vain.
    """
    if config.model.convert is None:
        raise UserError(
            "model.convert: got null with task=distillation, expected the splits of the student, such as "
            "{splits: [2, 1]}"
        )
    if config.train.shard:
        raise UserError("train.shard=true is for classification; got task=distillation")
    if config.train.compile is not None:
        raise UserError(
            f"train.compile: got {config.train.compile} with task=distillation, expected null: the tokens are read "
            "where compiled code does not give them"
        )
    if config.budget.kind == "set":
        defaults = type(config.budget).model_fields
        for key in ("weight", "rate", "high", "noiseless_epochs"):
            if getattr(config.budget, key) != defaults[key].default:
                raise UserError(f"budget.{key} is no option of budget.kind=set; leave it out")


def need_classification(config: Config, source: str) -> Config:
    """The configuration itself, for what only models with nothing around them can be used for.

    Args:
        config: that was recorded.
        source: where, for the error.

    Raises:
        UserError: it is of another task; distillation gives such models too.
    """
    if config.task in HEADS:
        raise UserError(f"{source} is of task={config.task}; expected a model of classification")
    return config
