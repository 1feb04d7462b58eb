"""Starting, agreeing in and ending the processes of a run."""

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DataLoaderConfiguration,
    PrecisionType,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
)

from dge_recipes.config.schema import Config
from dge_recipes.data.workers import forget_workers
from dge_recipes.errors import UserError
from dge_recipes.machine_errors import machine_errors

__all__ = ["end_processes", "on_every_process", "on_main_process", "start_processes"]

T = TypeVar("T")


def start_processes(config: Config) -> Accelerator:
    """Accelerate's view of the processes that were launched.

    Precision, devices and sharding are the launcher's choice (``accelerate launch``). Without an accelerator
    on the machine the processes meet over gloo, whoever launched them.

    Raises:
        UserError: more processes were launched than take part.
    """
    forget_workers()
    cpu = config.train.device == "cpu" or not torch.accelerator.is_available()
    folder = config.output.dir
    _check_trackers(config.output.trackers)
    try:
        accelerator = Accelerator(
            cpu=cpu,
            dataloader_config=DataLoaderConfiguration(non_blocking=True),  # else every batch waits for the device
            gradient_accumulation_steps=config.train.accumulation_steps,
            log_with=list(config.output.trackers) or None,
            project_config=ProjectConfiguration(folder, logging_dir=f"{folder}/tensorboard"),
        )
    except ValueError as error:
        raise UserError(f"the processes cannot start: {error}") from error
    if accelerator.mixed_precision not in PrecisionType.list():  # one from the environment goes unchecked
        known = ", ".join(PrecisionType.list())
        raise UserError(f"mixed precision {accelerator.mixed_precision!r} is unknown; expected one of {known}")
    _check_distribution(accelerator)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise UserError(
            f"{launched} processes were launched but {accelerator.num_processes} take part; see the README on launchers"
        )
    return accelerator


def _check_distribution(accelerator: Accelerator) -> None:
    """Sharding is the training loop's own; and where Accelerate cannot shard, on CPUs, it does not say so."""
    asked = [
        name for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM") if os.environ.get(f"ACCELERATE_USE_{name}") == "true"
    ]
    if asked or accelerator.distributed_type.value in {"FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"}:
        kind = asked[0] if asked else accelerator.distributed_type.value
        raise UserError(
            f"{kind} is not supported here: launch with DDP, as gpu8.yaml does; to shard training, train.shard=true"
        )


def _check_trackers(names: Sequence[str]) -> None:
    """Accelerate would leave out a tracker whose package is missing."""
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in available:
            raise UserError(
                f"output.trackers: {name!r} is no tracker whose package is installed; there are {', '.join(available)}"
            )


def on_main_process(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Do something in the main process; every process returns its result, or raises its error.

    Without this an error in one process would leave the others waiting.

    Raises:
        MachineError: the machine kept the action from its end.
        UserError: the action raised one.
    """
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            with machine_errors():
                outcome[0] = action()
        except UserError as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def on_every_process(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Do something in every process; if one of them fails, all do.

    Raises:
        UserError: the action raised one, here or elsewhere.
    """
    own: UserError | None = None
    try:
        result = action()
    except UserError as error:
        own = error
    errors = gather_object([None if own is None else str(own)])
    if own is not None:
        raise own
    for number, told in enumerate(errors):
        if told is not None:
            raise UserError(f"process {number}: {told}")
    return result


def end_processes() -> None:
    """End the process group, if there is one: a group left open aborts at exit now and then."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
