"""Everything a run consists of, built in one place from its configuration."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.data.mixup import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from dge_recipes.checkpoints import CheckpointStore, restore_state
from dge_recipes.checkpoints.locate import CHECKPOINTS
from dge_recipes.checkpoints.training_state import Stateful
from dge_recipes.config import Config
from dge_recipes.data import HeldOutData, TrainingData, build_held_out, build_mixing, build_training, check_classes
from dge_recipes.errors import UserError
from dge_recipes.evaluation import Evaluation
from dge_recipes.models import build_model
from dge_recipes.processes import on_main_process
from dge_recipes.randomness import derive_seed, seed_everything
from dge_recipes.training.averages import Averages
from dge_recipes.training.bad_numbers import LossWatch
from dge_recipes.training.budgets import BudgetSteps, check_budget
from dge_recipes.training.distillation import Teacher, build_teacher, use_both_heads
from dge_recipes.training.losses import LossModule
from dge_recipes.training.optimization import build_optimizer, build_schedule
from dge_recipes.training.progress import Progress
from dge_recipes.training.reporting import Reporter
from dge_recipes.training.run_folder import METRICS_FILE, claim_run_folder, find_resume_point, rewind_metrics
from dge_recipes.training.sharding import check_sharding, shard
from dge_recipes.training.stopping import Agreement, StopSignal

__all__ = ["Run", "assemble", "set_up"]


@dataclass
class Run:
    """The parts of a run.

    Attributes:
        module: network and loss, as Accelerate prepared (and perhaps wrapped) it.
        model: the network alone.
        ema: its moving average, or None.
        budget: what holds its MACs down, told of every step's ratio.
        teacher: what it learns from beside the labels, or None.
        stop: whether this process was asked to stop; ``agreement`` tells the others.
        evaluations: the latest, of the network (``eval``) and of its average (``ema``).
        held_out: the held-out set; ``train_loader`` and ``held_out_loader`` are the loaders as prepared.
    """

    config: Config
    accelerator: Accelerator
    held_out: HeldOutData
    train_loader: Any
    held_out_loader: Any
    module: nn.Module
    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: Any
    schedule: Scheduler
    mixing: Mixup | None
    teacher: Teacher | None
    budget: BudgetSteps
    stop: StopSignal
    agreement: Agreement
    watch: LossWatch
    progress: Progress
    store: CheckpointStore
    reporter: Reporter
    averages: Averages
    evaluations: dict[str, Evaluation] = field(default_factory=dict)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.progress.steps_per_epoch * self.config.train.epochs

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


def set_up(config: Config, accelerator: Accelerator, stop: StopSignal, resume: str | None, overwrite: bool) -> Run:
    """Build a run, and bring it to where it was stopped.

    Nothing is written before data, model and configuration have been found sound.

    Args:
        config: the configuration.
        accelerator: of the processes that run.
        stop: of this process.
        resume: ``auto``, a path, or None.
        overwrite: delete what an earlier run left in the output folder.

    Raises:
        UserError: anything in configuration, data, checkpoint or output folder that the user can correct.
    """
    checkpoint = on_main_process(accelerator, lambda: find_resume_point(config, resume, overwrite))
    training, held_out = build_training(config, accelerator.num_processes), build_held_out(config)
    check_classes(training, held_out)
    run = assemble(config, accelerator, stop, training, held_out, init=checkpoint is None)
    on_main_process(accelerator, lambda: claim_run_folder(config, resume, checkpoint))
    if checkpoint is not None:
        restore_state(Path(checkpoint), run.model, run.ema and run.ema.module, run.raw_optimizer, run.registered)
    _start_records(run)
    return run


def assemble(
    config: Config,
    accelerator: Accelerator,
    stop: StopSignal,
    training: TrainingData,
    held_out: HeldOutData,
    *,
    init: bool,
) -> Run:
    """Build a run from its data; reads weights, writes nothing.

    Args:
        config, accelerator, stop: as for :func:`set_up`.
        training, held_out: the data.
        init: start from ``model.init_from``; False where a checkpoint follows.

    Raises:
        UserError: anything in configuration and weights that the user can correct.
    """
    if config.train.shard:
        check_sharding(config, accelerator)
    if config.train.non_finite == "skip" and accelerator.scaler is not None:
        raise UserError("train.non_finite=skip is not for fp16, whose loss scaler skips steps itself; use bf16")
    steps_per_epoch, global_batch = training.sampler.steps_per_epoch, training.sampler.global_batch
    mixing = build_mixing(config, held_out.num_classes)
    seed_everything(derive_seed(config.train.seed, "weights"))
    model = build_model(config.model, held_out.num_classes, held_out.image_shape, init=init)
    teacher = build_teacher(config, held_out.num_classes, held_out.image_shape)
    check_budget(config.budget, model, held_out.image_shape)
    use_both_heads(model, teacher is not None)
    ema = _place(model, config, accelerator)
    _adapt(model, config)
    optimizer = build_optimizer(config.optim, model, global_batch)
    schedule = build_schedule(config.schedule, optimizer, steps_per_epoch, config.train.epochs)
    losses = LossModule(model, config)
    # A sharded network has what DDP would wrap it for.
    module = accelerator.prepare_model(losses, evaluation_mode=config.train.shard)
    wrapped, train_loader, held_out_loader = accelerator.prepare(optimizer, training.loader, held_out.loader)
    progress, folder = Progress(steps_per_epoch, global_batch), Path(config.output.dir)
    return Run(
        config=config,
        accelerator=accelerator,
        held_out=held_out,
        train_loader=train_loader,
        held_out_loader=held_out_loader,
        module=module,
        model=model,
        ema=ema,
        optimizer=wrapped,
        schedule=schedule,
        mixing=mixing,
        teacher=None if teacher is None else teacher.to(accelerator.device),
        budget=BudgetSteps(losses.budget, accelerator, model),
        stop=stop,
        agreement=Agreement(accelerator),
        watch=LossWatch(accelerator.device),
        progress=progress,
        store=CheckpointStore(folder / CHECKPOINTS, config.checkpoint.keep_last),
        reporter=Reporter(accelerator, progress, steps_per_epoch * config.train.epochs, folder / METRICS_FILE),
        averages=Averages(accelerator),
    )


def _place(model: nn.Module, config: Config, accelerator: Accelerator) -> ModelEmaV3 | None:
    """Move the network to the device, in place, and make its average; both sharded if that is asked for."""
    model.to(accelerator.device)
    ema = None if config.train.ema_decay is None else ModelEmaV3(model, decay=config.train.ema_decay)
    if config.train.shard:
        for network in (model,) if ema is None else (model, ema.module):
            shard(network, accelerator)
    return ema


def _adapt(model: nn.Module, config: Config) -> None:
    """Activation checkpointing and compilation, in place."""
    if config.train.checkpoint_activations:
        if not hasattr(model, "set_grad_checkpointing"):
            raise UserError(f"train.checkpoint_activations: model {config.model.name} cannot recompute activations")
        model.set_grad_checkpointing(True)  # type: ignore[operator]  # timm's
    if config.train.compile is not None:
        known = torch.compiler.list_backends(exclude_tags=())
        if config.train.compile not in known:
            raise UserError(f"train.compile: got {config.train.compile!r}, expected one of {', '.join(known)}")
        model.compile(backend=config.train.compile, dynamic=True)


def _start_records(run: Run) -> None:
    """Drop what a stopped run recorded after its last checkpoint, then open the trackers."""
    step, metrics = run.progress.step, Path(run.config.output.dir) / METRICS_FILE
    on_main_process(run.accelerator, lambda: rewind_metrics(metrics, step))
    try:
        run.accelerator.init_trackers("dge-recipes", init_kwargs={"tensorboard": {"purge_step": step or None}})
    except (OSError, ValueError) as error:
        raise UserError(f"output.trackers cannot start: {error}") from error
    run.reporter.resume(step)
