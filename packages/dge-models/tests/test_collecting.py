from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
from small_models import Build, scatter_routing, small_config
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from dge_models import (
    BudgetController,
    BudgetLoss,
    RandomBudget,
    Routing,
    collect_routings,
    deterministic_routing,
    find_routed,
    mac_ratio,
    set_fixed_queries,
)

NAMES = ["deit_dge_s124_tiny_patch16_256", "pvt_dge_s124_tiny_256", "dpvt_dge_s124_tiny_256"]
every_kind = pytest.mark.parametrize("name", NAMES)


class Head(nn.Module):
    """Knows the backbone's features alone, as detectors do."""

    def __init__(self, backbone: nn.Module, checkpointing: bool = False) -> None:
        super().__init__()
        self.backbone, self.checkpointing = backbone, checkpointing

    def forward(self, images: Tensor) -> Tensor:
        maps: Any = (
            checkpoint(self.backbone, images, use_reentrant=False) if self.checkpointing else self.backbone(images)
        )
        return torch.stack([part.square().mean() for part in maps]).sum()


def _images(name: str, batch: int = 2) -> Tensor:
    size = small_config(name)["img_size"]
    return torch.randn(batch, 3, size, size)


def _features(name: str, **kwargs: Any) -> Any:
    return scatter_routing(timm.create_model(name, features_only=True, **small_config(name), **kwargs))


def _assert_same(got: list[Routing], expected: list[Routing]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.choice, b.choice)
        assert torch.equal(a.queries, b.queries)


@every_kind
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_the_budget_trains_the_routers_of_a_backbone(name: str, blocks: bool, whole: bool) -> None:
    module = Head(_features(name), checkpointing=whole).train()
    if blocks:
        find_routed(module).set_grad_checkpointing()
    images = _images(name).requires_grad_()
    with deterministic_routing(), collect_routings(module) as collected:
        module(images)
        loss = sum(
            term(collected.model, collected.routings) for term in (BudgetLoss(), BudgetController(), RandomBudget(0.5))
        )
        loss = loss + mac_ratio(collected.model, collected.routings)
        loss.backward()  # inside: what is repeated here must not count
    gates = {key: value.grad for key, value in module.named_parameters() if "router" in key}
    assert gates
    assert all(grad is not None for grad in gates.values())
    assert any(grad.any() for grad in gates.values() if grad is not None)
    assert len(collected.records[0].forwards) == 1
    with deterministic_routing():
        _assert_same(collected.routings, collected.model.forward_routed(images)[1])


@every_kind
def test_several_forward_passes_are_one_batch(small: Build, name: str) -> None:
    model = small(name)
    first, second = _images(name), _images(name, 3)
    with collect_routings(nn.Sequential(model)) as collected:
        model(first)
        model.forward_features(second)
    both = model.forward_routed(torch.cat([first, second]))[1]
    _assert_same(collected.routings, both)
    assert collected.model is model
    assert [part[0].choice.shape[0] for part in collected.records[0].forwards] == [2, 3]
    torch.testing.assert_close(mac_ratio(model, collected.routings), mac_ratio(model, both))


def test_other_grids_and_parts_of_a_model_are_told_apart(small: Build) -> None:
    model = small("pvt_dge_s124_tiny_256")
    with collect_routings(model) as collected:
        model(torch.randn(1, 3, 64, 64))
        model(torch.randn(1, 3, 64, 96))
    with pytest.raises(ValueError, match=r"token grids of \[\(16, 16\), \(16, 24\)\]; expected one grid"):
        _ = collected.routings
    with collect_routings(model) as collected:
        model(torch.randn(1, 3, 64, 64))
        model.forward_intermediates(torch.randn(1, 3, 64, 64), indices=[0], stop_early=True)
    with pytest.raises(ValueError, match=r"forward passes of \[5, 1\] routed blocks"):
        _ = collected.routings


@every_kind
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_evaluation_computes_the_same(small: Build, name: str, fixed: bool, grad: bool) -> None:
    model, images = small(name), _images(name)
    if fixed:
        set_fixed_queries(model, 0.7)
    model.set_grad_checkpointing(grad)
    with torch.set_grad_enabled(grad):
        expected, routings = model.forward_routed(images)
        with collect_routings(model) as collected:
            out = model(images)
            assert model.forward_routed(images)[0].shape == out.shape
    assert torch.equal(out, expected)
    _assert_same(collected.records[0].forwards[0], routings)
    _assert_same(collected.records[0].forwards[1], routings)
    if grad:
        out.sum().backward()
        assert len(collected.records[0].forwards) == 2


def test_two_backbones_are_two_records(small: Build) -> None:
    model = small()
    both = nn.ModuleDict({"left": model, "right": copy.deepcopy(model)})
    images = torch.randn(2, 3, 32, 32)
    with collect_routings(both) as collected:
        both["right"](images)
        both["left"](images[:1])
        both["right"](images)
    assert [(record.name, len(record.forwards)) for record in collected.records] == [("left", 1), ("right", 2)]
    assert collected.records[1].model is both["right"]
    assert collected.records[1].routings[0].choice.shape[0] == 4
    for attribute in ("model", "routings"):
        with pytest.raises(ValueError, match=r"2 models with routed blocks \(left, right\); expected one"):
            getattr(collected, attribute)


def test_nothing_stays_on_the_modules_and_contexts_nest(small: Build) -> None:
    model, other, images = small(), small(), torch.randn(1, 3, 32, 32)
    before = {name: set(vars(part)) for name, part in model.named_modules()}
    with collect_routings(model) as outer:
        model(images)
        with pytest.raises(ZeroDivisionError), collect_routings(model) as inner:
            model(images)
            other(images)
            raise ZeroDivisionError
        model(images)
    model(images)
    assert len(outer.records[0].forwards) == 3
    assert len(inner.records[0].forwards) == 1
    assert {name: set(vars(part)) for name, part in model.named_modules()} == before
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_threads_do_not_hear_each_other(small: Build) -> None:
    model = small()

    def collect(batch: int) -> list[int]:
        with torch.no_grad(), collect_routings(model) as collected:
            for _ in range(5):
                model(torch.randn(batch, 3, 32, 32))
        return [part[0].choice.shape[0] for part in collected.records[0].forwards]

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(collect, (1, 2, 3))) == [[1] * 5, [2] * 5, [3] * 5]
    with collect_routings(model) as collected, ThreadPoolExecutor(1) as pool:
        pool.submit(model, torch.randn(1, 3, 32, 32)).result()
    with pytest.raises(ValueError, match=r"DGEVisionTransformer was not run; .* in the same thread"):
        _ = collected.routings


# Between two graphs torch.compile looks at gradients of tensors that have none; it hides the warning, not the error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_models_are_collected(small: Build) -> None:
    torch.compiler.reset()
    gradients, found, images = [], [], torch.randn(1, 3, 32, 32)
    counter = CompileCounterWithBackend("eager")
    for compiled in (False, True):
        torch.manual_seed(0)
        model = small(depth=1).train()
        if compiled:
            model.compile(backend=counter)
            model(images)
            assert counter.frame_count == 1
        with deterministic_routing(), collect_routings(model) as collected:
            loss = model(images).square().sum()
        (loss + BudgetLoss(0.9)(collected.model, collected.routings)).backward()
        found.append(collected.routings)
        gradients.append({key: each.grad for key, each in model.named_parameters()})
    assert counter.frame_count > 1
    _assert_same(*found)
    for key, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], expected, msg=key)
    torch.compiler.reset()


def test_compiled_blocks_are_collected(small: Build) -> None:
    model, images = small(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model.forward_routed(images)[1]
        for block in model.blocks:
            block.compile(backend="eager")
        with collect_routings(model) as collected:
            model(images)
    _assert_same(collected.routings, expected)
    torch.compiler.reset()


def test_modules_without_a_model_are_refused(small: Build) -> None:
    with pytest.raises(ValueError, match="got Linear; expected a model with routed blocks"):
        collect_routings(nn.Linear(2, 2)).__enter__()
