"""The budget term of a recipe, and what it learns after every step."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import dge_models
from dge_models import BudgetTerm
from dge_recipes.config.schema import BudgetConfig
from dge_recipes.errors import UserError
from dge_recipes.models import is_routed

__all__ = ["BudgetSteps", "build_budget", "check_budget"]


def build_budget(config: BudgetConfig, seed: int) -> BudgetTerm:
    """The term of ``budget.kind``.

    Args:
        config: the ``budget`` section.
        seed: the run's, for a term that draws.

    Raises:
        UserError: an option that the kind does not have, or values that do not go together.
    """
    weight = {} if config.weight is None else {"weight": config.weight}
    rate = {} if config.rate is None else {"rate": config.rate}
    if config.kind == "loss" and rate:
        raise UserError("budget.rate is no option of budget.kind=loss; leave it null")
    try:
        if config.kind == "controller":
            return dge_models.BudgetController(config.target, **weight, **rate)
        if config.kind == "set":
            from dge_recipes.engine.fitted_routers import KeptRouters  # with all that fitting needs

            return KeptRouters(config.target)
        if config.kind == "random":
            return dge_models.RandomBudget(config.target, config.high, seed=seed, **weight, **rate)
        return dge_models.BudgetLoss(config.target, **weight)
    except ValueError as error:
        raise UserError(f"budget: {error}") from error


def check_budget(config: BudgetConfig, model: nn.Module, input_shape: tuple[int, int, int]) -> None:
    """A target that even the coarsest routing misses is a mistake in the config, to be told before any training.

    Raises:
        UserError: it is one.
    """
    if not is_routed(model):
        return
    training = model.training
    with torch.no_grad():
        _, routings = model.eval().forward_routed(torch.zeros(1, *input_shape))
    model.train(training)
    cheapest = dge_models.cheapest_ratio(model, routings)
    if config.target < cheapest:
        raise UserError(
            f"budget.target={config.target} is out of reach: with every region at its coarsest split the model still "
            f"computes {cheapest:.3f} of its MACs; expected more than that"
        )


class BudgetSteps:
    """Hands a term the MAC ratio of every step's global batch.

    Terms that learn from it, those with an ``update`` of their own, need it as a number, which waits for the
    device at every step; the paper's loss learns nothing, and nothing is waited for.

    Args:
        term: of the run.
        accelerator: of the run.
        model: whose ratio it is; one without routers has nothing to learn from.
    """

    def __init__(self, term: BudgetTerm, accelerator: Accelerator, model: nn.Module) -> None:
        self.term, self._accelerator, self._model = term, accelerator, model
        self._learns = is_routed(model) and type(term).update is not BudgetTerm.update
        self._measured: list[Tensor] = []

    def begin(self) -> None:
        """Before a forward; prepares the model at the first one of a step."""
        if self._learns and not self._measured:
            self.term.begin_step(self._model)

    def add(self, measured: Tensor) -> None:
        """After a forward: what the term measured, float32 []."""
        if self._learns:
            self._measured.append(measured.detach())

    def finish(self, *, skipped: bool = False) -> None:
        """After an optimiser step, or after one that was skipped. Every process must call it."""
        measured, self._measured = self._measured, []
        if measured and not skipped:
            ratio = self._accelerator.reduce(torch.stack(measured).mean(), reduction="mean")
            self.term.update(float(ratio))
