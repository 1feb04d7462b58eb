"""What a run does when it is asked to stop, or when a loss is not finite."""

import logging

import torch
from accelerate.utils import gather_object
from torch.nn.utils import get_total_norm

from dge_recipes.errors import RunStopped, UserError
from dge_recipes.training.bad_numbers import BadBatch
from dge_recipes.training.saving import save
from dge_recipes.training.setup import Run
from dge_recipes.training.stopping import Halt

__all__ = ["halt_if_due", "must_skip"]

_LOG = logging.getLogger(__name__)
_HELP = "a lower optim.lr may help, or train.non_finite=skip"


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
        raise UserError(f"{_first_of_all(run, bad)}; {_HELP}")
    if halt is not Halt.NONE:
        folder = save(run)
        raise RunStopped(
            f"stopped by {halt.name} at step {run.progress.step} of {run.total_steps}; saved {folder}; "
            "continue with --resume auto",
            interrupted=halt is Halt.SIGINT,
        )


def must_skip(run: Run) -> bool:
    """Before an optimiser step, whether to leave it out in all processes. Every process calls it.

    Looks at the loss and at the gradients, and so waits for the device.

    Raises:
        UserError: more steps than ``train.skip_limit`` were left out.
    """
    bad = run.watch.look(wait=True)
    own = Halt.NONE if bad is None and _gradients_finite(run) else Halt.BAD_NUMBER
    if run.agreement.settle(own) is not Halt.BAD_NUMBER:
        return False
    reason = _first_of_all(run, bad)
    run.watch.forget()
    run.progress.skipped += 1
    limit = run.config.train.skip_limit
    if run.progress.skipped > limit:
        raise UserError(f"{reason}; more than train.skip_limit={limit} steps had to be skipped")
    if run.accelerator.is_main_process:
        _LOG.warning("step skipped, %d so far: %s", run.progress.skipped, reason)
    return True


def _first_of_all(run: Run, bad: BadBatch | None) -> str:
    """The earliest of the processes' bad batches, saved, in words."""
    own = None if bad is None else (bad.place.step, _keep(run, bad))
    found = [each for each in gather_object([own]) if each is not None]
    if not found:
        return f"a gradient is not finite at step {run.progress.step + 1}"
    text: str = min(found)[1]
    return text


def _keep(run: Run, bad: BadBatch) -> str:
    try:
        path = bad.save(run.folder, run.config.train.seed)
    except UserError as error:
        return f"{bad.describe()}; {error}"
    return f"{bad.describe()}; its batch is in {path}"


def _gradients_finite(run: Run) -> bool:
    gradients = [parameter.grad for parameter in run.model.parameters() if parameter.grad is not None]
    norm = get_total_norm(gradients)
    return bool(torch.isfinite(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
