from __future__ import annotations

import json

import pytest
import torch
from small_models import Build

from dge_models import BudgetController, BudgetLoss, BudgetTerm, mac_ratio
from dge_models.vit import routed_blocks


def settle(small: Build, term: BudgetTerm, steps: int = 120) -> float:
    """The evaluated ratio after training the routers alone, against a task that wants every query computed."""
    model, images = small(depth=2), torch.randn(8, 3, 32, 32)
    model.train()
    for block in routed_blocks(model):
        block.router.reset_parameters()
    parameters = [p for b in routed_blocks(model) for p in b.router.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    for _ in range(steps):
        term.begin_step(model)
        routings = model.forward_routed(images)[1]
        task = -0.5 * mac_ratio(model, routings)
        (task + term(model, routings)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        term.update(term.measure(model, routings).item())
    with torch.no_grad():
        return mac_ratio(model.eval(), model.forward_routed(images)[1]).item()


@pytest.mark.parametrize("target", [0.4, 0.7])
def test_target_is_met_against_a_task_that_pulls_away(small: Build, target: float) -> None:
    assert settle(small, BudgetController(target, weight=2.0)) == pytest.approx(target, abs=0.02)


def test_the_plain_penalty_settles_above_its_target(small: Build) -> None:
    assert settle(small, BudgetLoss(0.5, weight=2.0)) > 0.55


def test_terms_of_the_loss(small: Build) -> None:
    model = small()
    routings = model.forward_routed(torch.randn(2, 3, 32, 32))[1]
    controller = BudgetController(0.5, weight=2.0, rate=0.1)
    controller.update(0.52)
    assert controller.multiplier == pytest.approx(0.002)
    gap = mac_ratio(model, routings) - 0.5
    torch.testing.assert_close(controller(model, routings), 0.002 * gap + 2.0 * gap**2)
    assert repr(controller) == "BudgetController(target=0.5, weight=2.0, rate=0.1)"


def test_multiplier_becomes_negative_below_the_target_and_far_gaps_count_little() -> None:
    controller = BudgetController(0.5, rate=0.1)
    controller.update(0.49)
    assert controller.multiplier == pytest.approx(-0.001)
    controller.update(1.0)
    assert controller.multiplier == pytest.approx(0.004)


def test_state_resumes_exactly_through_json() -> None:
    controller, resumed = BudgetController(0.5), BudgetController(0.5)
    for ratio in (0.9, 0.73, 0.512345678901):
        controller.update(ratio)
    resumed.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert resumed.multiplier == controller.multiplier != 0


def test_it_measures_the_choice_without_noise(small: Build) -> None:
    model, images = small().train(), torch.randn(8, 3, 32, 32)
    controller = BudgetController(0.5)
    torch.manual_seed(1)
    noise = [block.router.draw_noise(8, (8, 8), images.device) * 1000 for block in routed_blocks(model)]
    first = [torch.zeros_like(noise[0]), *noise[1:]]
    routings = model.forward_routed(images, noise=first)[1]
    quiet = model.eval().forward_routed(images)[1]
    # The first layer sees what evaluation sees; with loud noise, what the later ones chose says nothing.
    assert torch.equal(routings[0].logits.argmax(-1), quiet[0].choice.long())  # type: ignore[union-attr]
    only_first = [quiet[0], *(_quieted(routing) for routing in routings[1:])]
    expected = mac_ratio(model, only_first)
    torch.testing.assert_close(controller.measure(model, routings), expected.detach())
    assert (mac_ratio(model, routings) - expected).abs() > 0.01
    assert not controller.measure(model, routings).requires_grad


def _quieted(routing):  # type: ignore[no-untyped-def]
    """The routing that the recorded logits alone give."""
    choice = routing.logits.argmax(-1)
    gate = torch.nn.functional.one_hot(choice, 3).float()
    return type(routing).from_gate(choice, gate, routing.grid, routing.num_prefix_tokens, routing.splits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 1.5}, r"target: got 1\.5; expected a MAC ratio in \(0, 1\]"),
        ({"weight": -1.0}, "weight: got -1"),
        ({"rate": float("nan")}, "rate: got nan"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BudgetController(**arguments)
