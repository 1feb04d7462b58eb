"""Budget terms: the configured one is built, learns from every step, and resumes exactly."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dge_models import BudgetController, BudgetLoss, RandomBudget
from dge_recipes import train as recipe
from dge_recipes.config import BudgetConfig, Config
from dge_recipes.engine.budgets import build_budget
from dge_recipes.engine.interruption import Halt
from dge_recipes.errors import RunStopped, UserError
from dge_recipes.train import train


def test_kinds() -> None:
    loss = build_budget(BudgetConfig(target=0.6, weight=3.0), 0)
    assert isinstance(loss, BudgetLoss)
    assert (loss.target, loss.weight) == (0.6, 3.0)
    controller = build_budget(BudgetConfig(kind="controller", rate=0.5), 0)
    assert isinstance(controller, BudgetController)
    assert (controller.rate, controller.weight) == (0.5, BudgetController(0.5).weight)
    spread = build_budget(BudgetConfig(kind="random", target=0.4, high=0.9), 7)
    assert isinstance(spread, RandomBudget)
    assert (spread.low, spread.high, spread.seed) == (0.4, 0.9, 7)


def test_mistakes() -> None:
    with pytest.raises(UserError, match=r"budget\.rate is no option of budget.kind=loss"):
        build_budget(BudgetConfig(rate=0.5), 0)
    with pytest.raises(UserError, match="budget: high"):
        build_budget(BudgetConfig(kind="random", target=0.9, high=0.8), 0)


@pytest.mark.parametrize("kind", ["controller", "random"])
def test_what_a_term_learned_resumes_exactly(
    small_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    options = (f"budget.kind={kind}", "budget.weight=null", "budget.noiseless_epochs=0", "optim.name=adamw")
    whole, stopped = (small_config(*options, "train.accumulation_steps=2", output=name) for name in ("a", "b"))
    states = []
    original = recipe.write_summary
    monkeypatch.setattr(
        recipe, "write_summary", lambda run: states.append(run.budget.term.state_dict()) or original(run)
    )
    train(whole)
    calls = iter(range(100))
    before = recipe.halt_if_due

    def stop(run: object, *, before_saving: bool) -> None:
        run.stop.request = Halt.SIGTERM if next(calls) == 2 else Halt.NONE  # type: ignore[attr-defined]
        before(run, before_saving=before_saving)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(RunStopped):
        patch.setattr(recipe, "halt_if_due", stop)
        train(stopped)
    train(stopped, resume="auto")
    assert states[0] == states[1]
    learned = str(states[0])
    assert "0.0}" not in learned or kind == "random"
    weights = [
        load_file(sorted(Path(c.output.dir).glob("checkpoints/step_*"))[-1] / "model.safetensors")
        for c in (whole, stopped)
    ]
    assert all(weights[0][key].equal(weights[1][key]) for key in weights[0])
