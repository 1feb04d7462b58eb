"""torch.compile captures the models as one graph with dynamic shapes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from small_models import Build

from dge_models import deterministic_routing, set_training_mode


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_evaluation_is_one_graph_for_all_batch_sizes(small: Build) -> None:
    model = small(depth=2)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad(), torch.compiler.set_stance("default"):
        for batch in (4, 6):
            images = torch.randn(batch, 3, 32, 32)
            torch.testing.assert_close(compiled(images), model(images))
        with torch.compiler.set_stance("fail_on_recompile"):
            images = torch.randn(3, 3, 32, 32)
            logits = compiled(images)
        torch.testing.assert_close(logits, model(images))
        logits, routings = compiled(images, return_routing=True)
    assert torch.equal(routings[1].choice, model.forward_routed(images)[1][1].choice)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_a_training_step_is_one_graph(small: Build, mode: str) -> None:
    model, images = small(depth=2).train(), torch.randn(4, 3, 32, 32)
    set_training_mode(model, mode)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        model.zero_grad()
        with deterministic_routing():
            logits, routings = run(images, return_routing=True)
            (logits.square().sum() + sum(routing.queries.mean() for routing in routings)).backward()
        results.append([logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for eager, captured in zip(*results, strict=True):
        torch.testing.assert_close(captured, eager, atol=1e-5, rtol=1e-4)
