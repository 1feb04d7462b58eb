"""torch.compile captures the models as one graph with dynamic shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_models import Build
from torch._dynamo.testing import CompileCounter

from dge_models import deterministic_routing, set_training_mode

TWO_STAGES = {
    "patch_sizes": (4, 2),
    "embed_dims": (8, 16),
    "depths": (1, 1),
    "num_heads": (1, 2),
    "mlp_ratios": (2, 2),
}
every_kind = pytest.mark.parametrize(
    ("name", "short"),
    [
        ("deit_dge_s124_tiny_patch16_256", {"depth": 2}),
        ("pvt_dge_s124_tiny_256", {**TWO_STAGES, "sr_ratios": (4, 1)}),
        ("dpvt_dge_s124_tiny_256", TWO_STAGES),
    ],
)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _images(name: str, batch: int) -> torch.Tensor:
    size = 64 if "pvt" in name else 32
    return torch.randn(batch, 3, size, size)


@every_kind
def test_evaluation_is_one_graph_for_all_batch_sizes(small: Build, name: str, short: dict[str, Any]) -> None:
    model = small(name, **short)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad(), torch.compiler.set_stance("default"):
        for batch in (4, 6):
            images = _images(name, batch)
            torch.testing.assert_close(compiled(images), model(images))
        with torch.compiler.set_stance("fail_on_recompile"):
            images = _images(name, 3)
            logits = compiled(images)
        torch.testing.assert_close(logits, model(images))
        logits, routings = compiled(images, return_routing=True)
    assert torch.equal(routings[1].choice, model.forward_routed(images)[1][1].choice)


@every_kind
def test_plain_torch_compile_is_one_graph(small: Build, name: str, short: dict[str, Any]) -> None:
    model, images = small(name, **short), _images(name, 2)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images))
    assert counter.frame_count == 1
    counter.clear()
    set_training_mode(model.train(), "sparse")
    with deterministic_routing():
        logits, routings = compiled(images, return_routing=True)
        torch.testing.assert_close(logits, model(images))
    assert len(routings) == 2
    assert counter.frame_count == 1


@every_kind
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_a_training_step_is_one_graph(small: Build, name: str, short: dict[str, Any], mode: str) -> None:
    model, images = small(name, **short).train(), _images(name, 4)
    set_training_mode(model, mode)  # type: ignore[arg-type]
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


@every_kind
def test_evaluation_is_exported_for_all_batch_sizes(small: Build, name: str, short: dict[str, Any]) -> None:
    model = small(name, **short)
    with torch.no_grad():
        batch = {0: torch.export.Dim("batch", min=2, max=64)}
        exported = torch.export.export(model, (_images(name, 3),), dynamic_shapes={"x": batch}).module()
        for size in (2, 5):
            images = _images(name, size)
            torch.testing.assert_close(exported(images), model(images))
