"""Optimiser and learning-rate schedule, both timm's."""

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay  # type: ignore[attr-defined]  # not in an __all__
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.multistep_lr import MultiStepLRScheduler
from timm.scheduler.poly_lr import PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from dge_recipes.config.schema import OptimConfig, ScheduleConfig
from dge_recipes.errors import UserError

__all__ = ["build_optimizer", "build_schedule", "scaled_rate"]


def build_optimizer(config: OptimConfig, model: nn.Module, global_batch: int) -> torch.optim.Optimizer:
    """The optimiser over a model's parameters; biases, norms and what the model names get no weight decay.

    Of a detector or segmenter, what the models inside it name.

    Args:
        config: the ``optim`` section.
        model: on the device it will train on.
        global_batch: images per optimiser step, by which the learning rate is scaled.

    Raises:
        UserError: timm knows no such optimiser, or it takes no such argument.
    """
    options: dict[str, Any] = {"betas": config.betas, "eps": config.eps}
    options = {name: value for name, value in options.items() if value is not None}
    # timm asks the model itself.
    groups = None if hasattr(model, "no_weight_decay") else partial(_groups, weight_decay=config.weight_decay)
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model,
            opt=config.name,
            lr=scaled_rate(config, global_batch),
            weight_decay=config.weight_decay,
            param_group_fn=groups,
            **options,
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"optim.name={config.name} with {options or 'its defaults'}: {error}") from error
    for name, value in options.items():
        if any(group.get(name) != value for group in optimizer.param_groups):  # timm drops what it cannot use
            raise UserError(f"optim.{name} is no option of optim.name={config.name}; leave it null")
    return optimizer


def _groups(model: nn.Module, weight_decay: float) -> Any:
    """timm's groups of parameters, with what the models inside a network want no weight decay for."""
    spared = {
        f"{prefix}.{name}"
        for prefix, part in model.named_modules()
        if hasattr(part, "no_weight_decay")
        for name in part.no_weight_decay()
    }
    return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=spared)


def build_schedule(
    config: ScheduleConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int, epochs: int
) -> Scheduler:
    """Linear warm-up, then a cosine, steps or a polynomial that count from the start, per optimiser step.

    The rate is a function of the number of steps done: call ``step_update(steps_done)`` after each.

    Args:
        config: the ``schedule`` section.
        optimizer: whose rate is set; the rate it has now is the schedule's top.
        steps_per_epoch: optimiser steps in one epoch.
        epochs: epochs of the run.

    Raises:
        UserError: the warm-up takes the whole run, a rate exceeds the peak, or milestones are missing, not ascending,
            beyond the run, or of no use to the kind.
    """
    if config.warmup_epochs >= epochs:
        raise UserError(
            f"schedule.warmup_epochs={config.warmup_epochs} leaves nothing of train.epochs={epochs}; expected fewer"
        )
    _check_milestones(config, epochs)
    peak = optimizer.param_groups[0]["lr"]
    floors = () if config.kind == "step" else (("min_lr", config.min_lr),)
    for key, rate in (("warmup_lr", config.warmup_lr), *floors):
        if rate > peak:
            raise UserError(f"schedule.{key}={rate:g} is above the peak learning rate, {peak:g}; expected less")
    shared: dict[str, Any] = {
        "warmup_t": round(config.warmup_epochs * steps_per_epoch),
        "warmup_lr_init": config.warmup_lr,
        "warmup_prefix": False,
        "t_in_epochs": False,
    }
    if config.kind == "step":
        # timm takes the milestone m as reached one step early, at m - 1 steps done.
        reached = [round(epoch * steps_per_epoch) + 1 for epoch in config.milestones]
        return MultiStepLRScheduler(optimizer, reached, decay_rate=config.gamma, **shared)
    shared.update(t_initial=steps_per_epoch * epochs, lr_min=config.min_lr)
    if config.kind == "poly":
        return PolyLRScheduler(optimizer, power=config.power, **shared)
    return CosineLRScheduler(optimizer, **shared)


def _check_milestones(config: ScheduleConfig, epochs: int) -> None:
    got = f"schedule.milestones: got {list(config.milestones)}"
    if config.kind != "step":
        if config.milestones:
            raise UserError(f"{got}, expected none with schedule.kind={config.kind}")
        return
    ascending = all(early < late for early, late in pairwise(config.milestones))
    if not config.milestones or not ascending or config.milestones[-1] >= epochs:
        raise UserError(f"{got}, expected ascending epochs below train.epochs={epochs}, such as [8, 11] of 12")


def scaled_rate(config: OptimConfig, global_batch: int) -> float:
    """The peak learning rate for a global batch: linear in it where ``optim.lr_batch`` is set."""
    return config.lr if config.lr_batch is None else config.lr * global_batch / config.lr_batch
