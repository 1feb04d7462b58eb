from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_models import Build

from dge_models import (
    BudgetController,
    BudgetLoss,
    BudgetTerm,
    RandomBudget,
    cheapest_ratio,
    count_macs,
    mac_ratio,
    set_training_mode,
)
from dge_models.vit import routed_blocks


@pytest.mark.parametrize("layers", [None, [1]])
def test_ratio_is_the_mean_share_of_the_whole_models_macs(small: Build, layers: list[int] | None) -> None:
    model, images = small(layers=layers), torch.randn(6, 3, 28, 32)
    model.set_input_size((28, 32))
    count = count_macs(model, images)
    ratio = mac_ratio(model, model.forward_routed(images)[1])
    torch.testing.assert_close(ratio.double(), (count.total / count.static_total).mean(), rtol=1e-6, atol=0)


def test_ratio_follows_the_grid_of_the_images(small: Build) -> None:
    model, images = small(dynamic_img_size=True), torch.randn(2, 3, 20, 44)
    count = count_macs(model, images)
    ratio = mac_ratio(model, model.forward_routed(images)[1])
    torch.testing.assert_close(ratio.double(), (count.total / count.static_total).mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_descending_the_loss_reaches_the_target(small: Build, mode: str) -> None:
    model, images = small(), torch.randn(16, 3, 32, 32)
    set_training_mode(model.train(), mode)
    for block in routed_blocks(model):
        block.router.reset_parameters()
    loss = BudgetLoss(target=0.6, weight=10.0)
    optimizer = torch.optim.Adam([p for b in routed_blocks(model) for p in b.router.parameters()], lr=0.05)
    ratios = []
    for _ in range(80):
        optimizer.zero_grad()
        routings = model.forward_routed(images)[1]
        loss(model, routings).backward()
        optimizer.step()
        ratios.append(mac_ratio(model, routings).item())
    assert ratios[0] > 0.9
    assert sum(ratios[-20:]) / 20 == pytest.approx(0.6, abs=0.05)


def test_loss_is_the_weighted_square(small: Build) -> None:
    model = small()
    routings = model.forward_routed(torch.randn(2, 3, 32, 32))[1]
    expected = 3.0 * (mac_ratio(model, routings) - 0.25) ** 2
    torch.testing.assert_close(BudgetLoss(0.25, 3.0)(model, routings), expected)
    assert repr(BudgetLoss(0.25, 3.0)) == "BudgetLoss(target=0.25, weight=3.0)"


@pytest.mark.parametrize("target", [0, -0.5, 1.01, float("nan")])
def test_targets_outside_zero_to_one_are_refused(target: float) -> None:
    with pytest.raises(ValueError, match=r"target: got .*; expected a MAC ratio in \(0, 1\]"):
        BudgetLoss(target)


@pytest.mark.parametrize("weight", [-1.0, float("nan")])
def test_negative_weights_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="weight: got"):
        BudgetLoss(0.5, weight)


def test_routings_of_another_model_are_refused(small: Build) -> None:
    model = small()
    routings = model.forward_routed(torch.randn(2, 3, 32, 32))[1]
    with pytest.raises(ValueError, match="routings: got none"):
        mac_ratio(model, [])
    with pytest.raises(ValueError, match="routings: got 2; expected one per routed block, 3"):
        mac_ratio(model, routings[:2])
    with pytest.raises(ValueError, match=r"got Sequential; expected a vision transformer .*pass the module inside"):
        mac_ratio(torch.nn.Sequential(model), routings)


@pytest.mark.parametrize("kwargs", [{}, {"img_size": 28}, {"layers": [1]}, {"splits": (2, 1)}])
def test_cheapest_ratio_is_that_of_the_coarsest_routing(small: Build, kwargs: dict[str, Any]) -> None:
    model, images = small(**kwargs), torch.randn(2, 3, kwargs.get("img_size", 32), kwargs.get("img_size", 32))
    cheapest = cheapest_ratio(model, model.forward_routed(images)[1])
    for block in routed_blocks(model):
        with torch.no_grad():
            block.router.gate.bias[-1] += 1e4
    assert cheapest == pytest.approx(mac_ratio(model, model.forward_routed(images)[1]).item(), abs=1e-6)


@pytest.mark.parametrize("term", [BudgetLoss(0.1), BudgetController(0.1), RandomBudget(0.1)])
def test_targets_below_the_cheapest_routing_are_refused(small: Build, term: BudgetTerm) -> None:
    model = small()
    routings = model.forward_routed(torch.randn(2, 3, 32, 32))[1]
    with pytest.raises(ValueError, match=r"target: got 0\.1; expected at least 0\.2134, the MAC ratio of the cheapest"):
        term(model, routings)


@pytest.mark.parametrize("term", [BudgetLoss(0.5), BudgetController(0.5), RandomBudget(0.5)])
def test_every_term_takes_the_calls_of_a_training_step(small: Build, term: BudgetTerm) -> None:
    model = small().train()
    assert not list(term.parameters()) and not list(term.buffers())
    term.begin_step(model)
    routings = model.forward_routed(torch.randn(2, 3, 32, 32))[1]
    term(model, routings).backward()
    assert routed_blocks(model)[0].router.gate.weight.grad is not None
    term.update(term.measure(model, routings).item())
    copy.deepcopy(term).load_state_dict(term.state_dict())


def test_the_paper_measures_with_noise(small: Build) -> None:
    model = small().train()
    routings = model.forward_routed(torch.randn(4, 3, 32, 32))[1]
    assert BudgetLoss(0.5).measure(model, routings) == mac_ratio(model, routings)
    assert mac_ratio(model.eval(), model.forward_routed(torch.randn(4, 3, 32, 32))[1], noiseless=True) > 0
