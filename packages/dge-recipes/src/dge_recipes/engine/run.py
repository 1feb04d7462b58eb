"""The parts of a run, in one object that the training loop hands around."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.scheduler.scheduler import Scheduler
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from dge_recipes.checkpoints import CheckpointStore
from dge_recipes.checkpoints.training_state import Stateful
from dge_recipes.config import Config
from dge_recipes.data import HeldOutData
from dge_recipes.engine.budgets import BudgetSteps
from dge_recipes.engine.consensus import Agreement
from dge_recipes.engine.interruption import StopSignal
from dge_recipes.engine.non_finite import LossWatch
from dge_recipes.engine.progress import Progress
from dge_recipes.engine.reporting import Averages, Reporter
from dge_recipes.engine.run_data import RunData
from dge_recipes.tasks.task import Task, TaskEvaluation

__all__ = ["Run"]


@dataclass
class Run:
    """The parts of a run.

    Attributes:
        task: what is learnt; knows data, model, loss and evaluation.
        prepare: turns a batch of the loader into what ``module`` takes: mixes images, asks the teacher.
        module: network and loss, as Accelerate prepared (and perhaps wrapped) it.
        model: the network alone.
        ema: its moving average, or None.
        budget: what holds its MACs down, told of every step's ratio.
        stop: whether this process was asked to stop; ``agreement`` tells the others.
        evaluations: the latest, of the network (``eval``) and of its average (``ema``).
        held_out: the held-out set; ``train_loader`` and ``held_out_loader`` are the loaders as prepared.
        data: which images both sets hold.
    """

    config: Config
    task: Task
    accelerator: Accelerator
    held_out: HeldOutData
    train_loader: Any
    held_out_loader: Any
    module: nn.Module
    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: Any
    schedule: Scheduler
    prepare: Callable[[Any, Any], tuple[Any, Any, Any]]
    budget: BudgetSteps
    stop: StopSignal
    agreement: Agreement
    watch: LossWatch
    progress: Progress
    store: CheckpointStore
    reporter: Reporter
    averages: Averages
    data: RunData
    evaluations: dict[str, TaskEvaluation] = field(default_factory=dict)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.progress.steps_per_epoch * self.config.train.epochs - self.progress.shift

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.output.dir)

    @property
    def raw_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser without Accelerate's wrapper."""
        optimizer: torch.optim.Optimizer = self.optimizer.optimizer
        return optimizer

    @property
    def registered(self) -> dict[str, Stateful]:
        """What has state beside the network and the optimiser; all of it goes into checkpoints."""
        states: dict[str, Stateful] = {
            "progress": self.progress,
            "schedule": self.schedule,
            "averages": self.averages,
            "budget": self.budget.term,
        }
        if self.accelerator.scaler is not None:
            states["scaler"] = self.accelerator.scaler
        return states
