"""Trying a recipe out: everything is built, one batch is trained on, nothing is written."""

import sys
from pathlib import Path
from typing import Any

from dge_recipes.config import Config
from dge_recipes.data import HeldOutData, TrainingData
from dge_recipes.engine.interruption import StopSignal
from dge_recipes.engine.progress import StepPosition
from dge_recipes.errors import UserError
from dge_recipes.processes import start_processes
from dge_recipes.tasks import task_of
from dge_recipes.train import assemble, forward_backward

__all__ = ["dry_run"]

_BATCH = 2


def dry_run(config: Config) -> dict[str, Any]:
    """Build model, data, optimiser and schedule of a recipe, and train one step on a batch of two images.

    What a run needs and this machine does not have is replaced, and each replacement is told on stderr: absent
    data by random images of the recipe's size, absent weights to start from by random ones, an absent teacher by
    none. Everything else is as the recipe says; nothing is written.

    Args:
        config: what would be run.

    Returns:
        ``parameters``, ``loss``, ``lr`` (peak, for the global batch that the recipe really has), ``images``
        (channels, height, width) and ``replaced``, what was told.

    Raises:
        UserError: anything that the user can correct.
    """
    accelerator = start_processes(config)
    replaced: list[str] = []
    config, training, held_out = _data(_weights(config, replaced), accelerator.num_processes, replaced)
    for line in replaced:
        if accelerator.is_main_process:
            print(f"dry run: {line}", file=sys.stderr)
    run = assemble(config, accelerator, StopSignal(), training, held_out, init=True)
    run.module.train()
    images, targets = next(iter(run.train_loader))
    forward_backward(run, StepPosition(1, (0, 0, accelerator.process_index)), images[:_BATCH], targets[:_BATCH])
    means = run.averages.pop()
    accelerator.free_memory()
    return {
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "loss": means["loss"],
        "lr": run.schedule.base_values[0],
        "images": held_out.image_shape,
        "steps": run.total_steps,
        "replaced": replaced,
    }


def _weights(config: Config, replaced: list[str]) -> Config:
    """The recipe without the weights that are not there."""
    source, teacher = config.model.init_from, config.distillation.weights
    if source is not None and not Path(source).exists():
        replaced.append(f"model.init_from={source} does not exist: starting from random weights")
        config = config.model_copy(update={"model": config.model.model_copy(update={"init_from": None})})
    if teacher is not None and not Path(teacher).exists():
        replaced.append(f"distillation.weights={teacher} does not exist: going on without a teacher")
        without = config.distillation.model_copy(update={"kind": "none"})
        config = config.model_copy(update={"distillation": without})
    if config.task == "distillation" and config.model.init_from is None and not config.model.name.startswith("local-"):
        if source is None:
            replaced.append(f"the weights of {config.model.name} are not looked for: starting from random ones")
        kwargs = {**config.model.kwargs, "pretrained": False}
        config = config.model_copy(update={"model": config.model.model_copy(update={"kwargs": kwargs})})
    return config


def _data(config: Config, processes: int, replaced: list[str]) -> tuple[Config, TrainingData, HeldOutData]:
    """The recipe's data, or others of the same shape that are made in memory."""
    # One batch is not worth as many processes as a run has.
    config = config.model_copy(update={"data": config.data.model_copy(update={"workers": 0})})
    task, root = task_of(config), getattr(config.data, "root", None)
    try:
        training, held_out = task.build_data(config, processes)
    except UserError as error:
        if root is None or Path(root).expanduser().exists():
            raise
        count = config.train.batch_size * processes * config.train.accumulation_steps
        data, what = task.stand_in(config, count)
        replaced.append(f"{error}: {what} instead")
        config = config.model_copy(update={"data": data})
        training, held_out = task.build_data(config, processes)
    return config, training, held_out
