"""The training recipe, from a configuration to a summary: set up, epoch, step, evaluate, save. Read it top down.

Its command line is :mod:`dge_recipes.commands.train`.
"""

import sys

from dge_recipes.commands.train import main

if __name__ == "__main__":  # before PyTorch is imported, which reads then what the command line sets
    sys.exit(main())

import logging
import time
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from dge_models import deterministic_routing
from dge_recipes.checkpoints import CheckpointStore, capture_state, read_progress, restore_state
from dge_recipes.checkpoints.store import CHECKPOINTS
from dge_recipes.config import Config
from dge_recipes.data import HeldOutData, TrainingData
from dge_recipes.data.workers import watched
from dge_recipes.engine.budgets import BudgetSteps, check_budget
from dge_recipes.engine.consensus import Agreement, Halt
from dge_recipes.engine.interruption import StopSignal, leaving
from dge_recipes.engine.losses import MEASURED
from dge_recipes.engine.non_finite import LossWatch, gradients_finite, tell_first
from dge_recipes.engine.optimization import build_optimizer, build_schedule
from dge_recipes.engine.progress import Progress, StepPosition
from dge_recipes.engine.reporting import Averages, Clock, Reporter
from dge_recipes.engine.run import Run
from dge_recipes.engine.run_data import RunData, check_same_everywhere, continue_data
from dge_recipes.engine.run_folder import (
    METRICS_FILE,
    check_still_there,
    claim_run_folder,
    find_resume_point,
    rewind_metrics,
)
from dge_recipes.engine.sharding import check_sharding, local_part, shard
from dge_recipes.engine.summary import write_summary
from dge_recipes.errors import RunStopped, UserError
from dge_recipes.machine_errors import machine_errors
from dge_recipes.models import routed_part
from dge_recipes.processes import on_every_process, on_main_process, start_processes
from dge_recipes.randomness import derive_seed, seed_everything
from dge_recipes.tasks import TaskEvaluation, task_of

__all__ = ["assemble", "evaluate", "forward_backward", "halt_if_due", "main", "save", "set_up", "train", "train_epoch"]

_LOG = logging.getLogger(__name__)


@machine_errors()
def train(config: Config, *, resume: str | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Train a model, and leave configuration, metrics, checkpoints and a summary in its folder.

    Every process of a launch calls it; call :func:`dge_recipes.processes.end_processes` before exiting.

    Args:
        config: what to do.
        resume: ``auto`` to continue in the output folder if there is something to continue, the path of a
            run or checkpoint to continue from, or None to start.
        overwrite: delete what an earlier run left in the output folder.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        MachineError: memory, disks, mounts, limits or processes failed; the checkpoints written before are intact.
        RunStopped: SIGTERM, SIGHUP or Ctrl-C came; where the run stands is saved.
        UserError: anything that the user can correct.
    """
    accelerator = start_processes(config)
    with leaving(accelerator, Path(config.output.dir)):
        with StopSignal() as stop:
            run = set_up(config, accelerator, stop, resume, overwrite)
            with closing(run.reporter):
                _train(run)
        return write_summary(run)


def _train(run: Run) -> None:
    progress = run.progress
    if run.task.judges_start and progress.step == 0 and progress.best_score < 0:  # else it was judged before a stop
        _finish_epoch(run)
    while progress.finished_epochs < run.config.train.epochs:
        if progress.epoch == progress.finished_epochs:  # else it was stopped between an epoch and its evaluation
            train_epoch(run)
        _finish_epoch(run)
    if not run.evaluations:  # the run was complete when it was resumed
        _evaluate(run)


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
    training, held_out = on_every_process(
        accelerator, lambda: task_of(config).build_data(config, accelerator.num_processes)
    )
    data = RunData.of(training, held_out)
    check_same_everywhere(data, accelerator)
    if checkpoint is not None:
        accept = config.data.changed == "accept"
        data = on_main_process(accelerator, lambda: continue_data(data, Path(checkpoint), accept=accept))
    run = assemble(config, accelerator, stop, training, held_out, init=checkpoint is None)
    run.data = data
    on_main_process(accelerator, lambda: claim_run_folder(config, resume, checkpoint))
    if checkpoint is not None:
        _restore(run, Path(checkpoint))
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
    task, classes = task_of(config), training.identity.classes
    seed_everything(derive_seed(config.train.seed, "weights"))
    model = task.build_model(config, classes.count, held_out.image_shape, init=init, classes=classes)
    prepare = task.preparation(config, model, held_out, classes, accelerator)
    check_budget(config.budget, routed_part(model), held_out.image_shape)
    ema = _to_device(model, config, accelerator)
    _adapt(task.backbone(model), config)
    optimizer = build_optimizer(config.optim, model, global_batch)
    schedule = build_schedule(config.schedule, optimizer, steps_per_epoch, config.train.epochs)
    losses = task.build_losses(config, model)
    # A sharded network has what DDP would wrap it for.
    module = accelerator.prepare_model(losses, evaluation_mode=config.train.shard)
    wrapped, train_loader, held_out_loader = accelerator.prepare(optimizer, training.loader, held_out.loader)
    progress, folder = Progress(steps_per_epoch, global_batch), Path(config.output.dir)
    return Run(
        config=config,
        task=task,
        accelerator=accelerator,
        held_out=held_out,
        train_loader=train_loader,
        held_out_loader=held_out_loader,
        module=module,
        model=model,
        ema=ema,
        optimizer=wrapped,
        schedule=schedule,
        prepare=prepare,
        budget=BudgetSteps(losses.budget, accelerator, routed_part(model)),
        stop=stop,
        agreement=Agreement(accelerator),
        watch=LossWatch(accelerator.device, losses.names),
        progress=progress,
        store=CheckpointStore(folder / CHECKPOINTS, config.checkpoint.keep_last),
        reporter=Reporter(accelerator, progress, steps_per_epoch * config.train.epochs, folder / METRICS_FILE),
        averages=Averages(accelerator, losses.names),
        data=RunData.of(training, held_out),
    )


def _to_device(model: nn.Module, config: Config, accelerator: Accelerator) -> ModelEmaV3 | None:
    """Move the network to the device, in place, and make its average; both sharded if that is asked for."""
    model.to(accelerator.device)
    ema = None if config.train.ema_decay is None else ModelEmaV3(model, decay=config.train.ema_decay)
    if config.train.shard:
        for network in (model,) if ema is None else (model, ema.module):
            shard(network, accelerator)
    return ema


def _adapt(model: nn.Module, config: Config) -> None:
    """Activation checkpointing and compilation of a backbone, in place."""
    if config.train.checkpoint_activations:
        if not hasattr(model, "set_grad_checkpointing"):
            raise UserError(f"train.checkpoint_activations: model {config.model.name} cannot recompute activations")
        model.set_grad_checkpointing(True)  # type: ignore[operator]  # timm's
    if config.train.compile is not None:
        known = torch.compiler.list_backends(exclude_tags=())
        if config.train.compile not in known:
            raise UserError(f"train.compile: got {config.train.compile!r}, expected one of {', '.join(known)}")
        model.compile(backend=config.train.compile, dynamic=True)


def _restore(run: Run, checkpoint: Path) -> None:
    """Bring a run to where a checkpoint is; an epoch of images that have changed may have another number of steps."""
    progress, registered, steps = run.progress, run.registered, run.progress.steps_per_epoch
    if run.data.changes:
        progress.steps_per_epoch = read_progress(checkpoint)["steps_per_epoch"]
    other_length = progress.steps_per_epoch != steps
    if other_length:
        del registered["schedule"]  # which knows the length of the run
    restore_state(checkpoint, run.model, run.ema and run.ema.module, run.raw_optimizer, registered)
    if other_length:
        progress.stretch(steps)
        run.schedule.step_update(progress.place)


def _start_records(run: Run) -> None:
    """Drop what a stopped run recorded after its last checkpoint, then open the trackers."""
    step, metrics = run.progress.step, Path(run.config.output.dir) / METRICS_FILE
    on_main_process(run.accelerator, lambda: rewind_metrics(metrics, step))
    try:
        run.accelerator.init_trackers("dge-recipes", init_kwargs={"tensorboard": {"purge_step": step or None}})
    except (OSError, ValueError) as error:
        raise UserError(f"output.trackers cannot start: {error}") from error
    run.reporter.resume(step, run.total_steps)


def train_epoch(run: Run) -> None:
    """Train to the end of the epoch under way, from wherever in it the run stands.

    Raises:
        RunStopped: SIGTERM, SIGHUP or Ctrl-C came; where the run stands is saved.
        UserError: a loss is not finite, or a checkpoint cannot be written.
    """
    progress, accelerator, epoch = run.progress, run.accelerator, run.progress.epoch
    run.module.train()
    run.train_loader.set_epoch(epoch)
    done = progress.step_in_epoch * run.config.train.accumulation_steps
    loader = skip_first_batches(run.train_loader, done) if done else run.train_loader
    clock = Clock(progress)
    for forward, (images, targets) in enumerate(clock.waiting(watched(loader)), start=done):
        # Drop path, mixing and Gumbel noise of this forward follow from its place in the run alone.
        place = StepPosition(progress.step + 1, (epoch, forward, accelerator.process_index))
        seed_everything(derive_seed(run.config.train.seed, "step", *place.position))
        with accelerator.accumulate(run.module):
            forward_backward(run, place, images, targets)
        if accelerator.sync_gradients:
            _finish_step(run, clock)


def forward_backward(run: Run, place: StepPosition, images: Any, targets: Any) -> None:
    """Forward, backward and, where gradient accumulation lets it, the optimiser's step.

    Args:
        run: the run.
        place: where in it this forward is.
        images: of a batch, on the run's device; in classification [B, C, H, W].
        targets: of the batch, as the task has them; in classification labels int64 [B].
    """
    config, accelerator = run.config.train, run.accelerator
    images, targets, answers = run.prepare(images, targets)
    run.budget.begin()
    noiseless = place.position[0] >= config.epochs - run.config.budget.noiseless_epochs
    with deterministic_routing() if noiseless else nullcontext():
        losses = run.module(images, targets, answers)
    run.watch.watch(place, run.averages.scalars(losses), images, targets)
    skips = config.non_finite == "skip"
    if run.watch.look(wait=skips) is None:
        run.averages.add(losses)
    run.budget.add(losses[MEASURED])
    accelerator.backward(losses["loss"])
    if accelerator.sync_gradients:
        _update(run)


def _update(run: Run) -> None:
    """The optimiser's step, unless it has to be skipped."""
    skipped = run.config.train.non_finite == "skip" and _must_skip(run)
    if not skipped:
        if run.config.optim.clip_grad is not None:
            run.accelerator.clip_grad_norm_(run.module.parameters(), run.config.optim.clip_grad)
        run.optimizer.step()
    run.optimizer.zero_grad()
    run.budget.finish(skipped=skipped)


def _must_skip(run: Run) -> bool:
    """Whether all processes leave this optimiser step out: a loss or a gradient of one is not finite.

    Raises:
        UserError: more steps than ``train.skip_limit`` were left out.
    """
    bad = run.watch.look(wait=True)
    own = Halt.NONE if bad is None and gradients_finite(run.model) else Halt.BAD_NUMBER
    if run.agreement.settle(own) is not Halt.BAD_NUMBER:
        return False
    reason = _tell_bad(run)
    run.watch.forget()
    run.progress.skipped += 1
    limit = run.config.train.skip_limit
    if run.progress.skipped > limit:
        raise UserError(f"{reason}; more than train.skip_limit={limit} steps had to be skipped")
    if run.accelerator.is_main_process:
        _LOG.warning("step skipped, %d so far: %s", run.progress.skipped, reason)
    return True


def _finish_step(run: Run, clock: Clock) -> None:
    """Schedule, average, log and save after an optimiser step."""
    progress, config = run.progress, run.config
    lr = run.raw_optimizer.param_groups[0]["lr"]
    progress.step += 1
    run.stop.worth_saving = True
    run.schedule.step_update(progress.place)
    if run.ema is not None:
        run.ema.update(run.model, step=progress.step)
    run.reporter.step()
    clock.steps += 1
    ends_epoch = progress.step_in_epoch == 0
    if progress.step % config.train.log_every == 0 or ends_epoch:
        means = run.averages.pop()
        run.reporter.training(means, lr, clock.lap())
    saves = _at_every_steps(run)
    halt_if_due(run, before_saving=saves or ends_epoch)
    if saves and not ends_epoch:  # at an epoch's end, after its evaluation
        clock.lap()
        save(run)
        clock.restart()


def halt_if_due(run: Run, *, before_saving: bool) -> None:
    """At a step boundary, end the run in all processes if one of them has a reason to. Every process calls it.

    Args:
        run: the run.
        before_saving: make sure of the step just done, so that no broken weights are saved; waits for the device
            and for the other processes.

    Raises:
        RunStopped: a signal came, to any of the processes; a checkpoint is written.
        UserError: a loss is not finite; its batch is saved.
    """
    bad = run.watch.look(wait=before_saving)
    own = run.stop.request if bad is None else Halt.BAD_NUMBER
    halt = run.agreement.settle(own) if before_saving else run.agreement.share(own)
    if halt is Halt.BAD_NUMBER:
        # A broken step breaks the weights of all processes: theirs may have found it a step later.
        raise UserError(f"{_tell_bad(run)}; a lower optim.lr may help, or train.non_finite=skip")
    if halt is not Halt.NONE:
        folder = save(run)
        raise RunStopped(
            f"stopped by {halt.name} at step {run.progress.step} of {run.total_steps}; saved {folder}; "
            "continue with --resume auto",
            interrupted=halt is Halt.SIGINT,
        )


def _tell_bad(run: Run) -> str:
    told = tell_first(run.watch.bad, run.folder, run.config.train.seed)
    return told or f"a gradient is not finite at step {run.progress.step + 1}"


def _finish_epoch(run: Run) -> None:
    """Evaluate and save after an epoch, as often as the configuration says and after the last; or before the first."""
    config, progress = run.config, run.progress
    last = progress.step == run.total_steps
    best = None
    if last or progress.epoch % config.train.eval_every == 0:
        start = time.perf_counter()
        _evaluate(run)
        progress.seconds += time.perf_counter() - start
        score = max(evaluation.score for evaluation in run.evaluations.values())
        if score > progress.best_score:
            progress.best_score = best = score
    progress.finished_epochs = progress.epoch
    due = progress.epoch % config.checkpoint.every_epochs == 0 or _at_every_steps(run)
    if last or best is not None or due:
        save(run, best)


def _at_every_steps(run: Run) -> bool:
    every = run.config.checkpoint.every_steps
    return every is not None and run.progress.step % every == 0


def _evaluate(run: Run) -> None:
    """Evaluate the network, and its moving average if there is one. A request to stop is not kept waiting."""
    networks = {"eval": run.model} if run.ema is None else {"eval": run.model, "ema": run.ema.module}
    done = {name: evaluate(run, network) for name, network in networks.items()}
    for name, evaluation in done.items():  # all or none: a run that is stopped between two evaluates both again
        run.reporter.evaluation(evaluation, run.task.figures(evaluation), name)
    run.evaluations.update(done)


def evaluate(run: Run, network: nn.Module) -> TaskEvaluation:
    """Evaluate the run's network or its average. Every process calls it.

    Raises:
        RunStopped: a signal came, to any of the processes; a checkpoint is written.
        UserError: too few of the held-out images can be read.
    """

    def after_batch() -> None:
        halt_if_due(run, before_saving=False)

    return run.task.evaluate(network, run.held_out_loader, run.accelerator, run.held_out, after_batch)


def save(run: Run, best_score: float | None = None) -> str:
    """Write a checkpoint of where the run stands. Every process calls it.

    Args:
        run: the run.
        best_score: the score that this checkpoint is the best for so far, else None.

    Returns:
        The checkpoint's folder.

    Raises:
        MachineError: it cannot be written; the checkpoints before it are intact.
        UserError: a weight is not finite; the checkpoints before it are intact.
    """
    # A finite loss does not mean finite gradients: nothing broken may push out a good checkpoint.
    finite = [local_part(parameter).isfinite().all().float() for parameter in run.model.parameters()]
    if float(run.accelerator.reduce(torch.stack(finite).min(), reduction="mean")) < 1:
        raise UserError(
            f"weights are not finite after step {run.progress.step}: no checkpoint is written, those before are "
            "intact; a lower optim.lr or optim.clip_grad may help"
        )
    average, data = run.ema and run.ema.module, run.data
    fill = capture_state(
        run.model, average, run.raw_optimizer, run.registered, data=data.as_dict(), label_names=data.label_names
    )

    def write() -> str:
        check_still_there(run.folder)
        return str(run.store.save(run.progress.step, fill, best_score))

    return on_main_process(run.accelerator, write)
