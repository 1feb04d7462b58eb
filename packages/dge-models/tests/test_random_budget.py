from __future__ import annotations

import json

import pytest
import torch
from small_models import Build

from dge_models import RandomBudget, mac_ratio, set_budget
from dge_models.vit import DGEVisionTransformer, routed_blocks


def run(model: DGEVisionTransformer, term: RandomBudget, steps: int) -> list[tuple[float, float]]:
    """(target, ratio) of each step, without training the model."""
    images, seen = torch.randn(16, 3, 32, 32), []
    model.train()
    for _ in range(steps):
        term.begin_step(model)
        with torch.no_grad():
            routings = model.forward_routed(images)[1]
        ratio = term.measure(model, routings).item()
        term.update(ratio)
        seen.append((term.target, ratio))
    return seen


def test_steps_meet_the_targets_drawn_for_them(small: Build) -> None:
    model = small(depth=2)
    for block in routed_blocks(model):
        block.router.reset_parameters()
    seen = run(model, RandomBudget(0.35, 0.9), 220)
    late = [abs(target - ratio) for target, ratio in seen[150:]]
    early = [abs(target - ratio) for target, ratio in seen[:20]]
    assert sum(late) / len(late) < 0.04 < sum(early) / len(early)


def _draw(model: DGEVisionTransformer, term: RandomBudget) -> list[float]:
    targets = []
    for _ in range(400):
        term.begin_step(model)
        targets.append(term.target)
    return targets


def test_targets_cover_the_range_and_its_ends(small: Build) -> None:
    targets = _draw(small(), RandomBudget(0.4, 0.8, skew=1.0))
    assert min(targets) == pytest.approx(0.4) and max(targets) == pytest.approx(0.8)
    for end in (0.4, 0.8):
        assert 20 < sum(target == pytest.approx(end) for target in targets) < 70
    inside = [target for target in targets if 0.41 < target < 0.79]
    assert sum(inside) / len(inside) == pytest.approx(0.6, abs=0.02)


def test_skew_prefers_low_targets(small: Build) -> None:
    model = small()
    shares = [sum(target < 0.5 for target in _draw(model, RandomBudget(0.4, 0.8, skew=skew))) for skew in (1.0, 3.0)]
    assert shares[0] == pytest.approx(400 * (0.1 + 0.8 / 4), abs=30)
    assert shares[1] == pytest.approx(400 * (0.1 + 0.8 * 0.25 ** (1 / 3)), abs=30)


def test_draws_depend_on_seed_and_step_alone(small: Build) -> None:
    model, draws = small(), []
    for seed, disturb in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(disturb)
        term = RandomBudget(0.4, seed=seed)
        targets = []
        for _ in range(5):
            term.begin_step(model)
            targets.append(term.target)
        draws.append(targets)
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


def test_state_resumes_exactly_through_json(small: Build) -> None:
    model, straight = small(), RandomBudget(0.3, seed=3)
    torch.manual_seed(5)
    run(model, straight, 7)
    state = json.loads(json.dumps(straight.state_dict()))
    torch.manual_seed(6)
    expected = run(model, straight, 5)
    resumed = RandomBudget(0.3, seed=3)
    resumed.load_state_dict(state)
    torch.manual_seed(6)
    assert run(model, resumed, 5) == expected
    assert resumed.state_dict() == straight.state_dict()


def test_shift_is_for_training_alone_and_not_in_the_weights(small: Build) -> None:
    model, images = small(), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        before = model(images)
    keys, term = set(model.state_dict()), RandomBudget(0.3)
    run(model, term, 30)
    assert routed_blocks(model)[0].router.shift is not None
    assert set(model.state_dict()) == keys
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            torch.testing.assert_close(model.eval()(images), before)


def test_set_budget_ends_the_shift(small: Build) -> None:
    model = small()
    run(model, RandomBudget(0.3), 5)
    set_budget(model, 0.5, [torch.randn(16, 3, 32, 32)])
    assert all(block.router.shift is None for block in routed_blocks(model))


def test_compiled_training_takes_new_shifts_without_recompiling(small: Build) -> None:
    model, term = small(depth=1).train(), RandomBudget(0.3)
    images = torch.randn(2, 3, 32, 32)
    term.begin_step(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    compiled(images, return_routing=True)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            term.begin_step(model)
            compiled(images, return_routing=True)


def test_penalty_is_the_price_and_the_papers_square(small: Build) -> None:
    model, term = small().train(), RandomBudget(0.3, price=0.5, weight=2.0)
    term.begin_step(model)
    routings = model.forward_routed(torch.randn(2, 3, 32, 32))[1]
    ratio = mac_ratio(model, routings)
    torch.testing.assert_close(term(model, routings), 2.0 * (ratio - term.target) ** 2)
    term.update(term.target + 0.1)  # spent too much: shifts go down, and queries cost something
    knots = term.get_extra_state()["knots"]
    assert sum(knots) < 0
    expected = -0.5 * sum(knots) / len(knots) * ratio + 2.0 * (ratio - term.target) ** 2
    torch.testing.assert_close(term(model, routings), expected)
    assert repr(term) == "RandomBudget(low=0.3, high=1.0, skew=3.0, price=0.5, weight=2.0, rate=2.0, seed=0)"


def test_bad_ranges_are_refused(small: Build) -> None:
    with pytest.raises(ValueError, match=r"low: got 0; expected a MAC ratio in \(0, 1\]"):
        RandomBudget(0)
    with pytest.raises(ValueError, match=r"high: got 0\.5; expected more than low, 0\.5"):
        RandomBudget(0.5, 0.5)
    with pytest.raises(ValueError, match="skew: got 0; expected a positive number"):
        RandomBudget(0.5, skew=0)
    with pytest.raises(ValueError, match="price: got -1"):
        RandomBudget(0.5, price=-1)
    with pytest.raises(ValueError, match="rate: got -1"):
        RandomBudget(0.5, rate=-1)
    with pytest.raises(ValueError, match="Linear has no routed block"):
        RandomBudget(0.5).begin_step(torch.nn.Linear(1, 1))
    model = small()
    routings = model.forward_routed(torch.randn(2, 3, 32, 32))[1]
    with pytest.raises(ValueError, match=r"target: got 0\.1; expected at least 0\.2134, .* cheapest routing"):
        RandomBudget(0.1)(model, routings)


def test_tables_of_another_size_are_refused() -> None:
    state = RandomBudget(0.3).state_dict()
    state["_extra_state"]["knots"] = [0.0]
    with pytest.raises((ValueError, RuntimeError), match="got a table of 1 knots; expected 9"):
        RandomBudget(0.3).load_state_dict(state)
