"""The models on a CUDA device: what the CPU computes, in training too, compiled and in half precision."""

from __future__ import annotations

import pytest
import torch
from small_models import build_small
from torch import nn

from dge_models import deterministic_routing, set_training_mode, trace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]


every_kind = pytest.mark.parametrize(
    "name", ["deit_dge_s124_tiny_patch16_256", "pvt_dge_s124_tiny_256", "dpvt_dge_s124_tiny_256"]
)


def _case(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A small model, and images for it, on the CPU."""
    size = 64 if "pvt" in name else 32
    return build_small(name), torch.randn(4, 3, size, size)


@pytest.fixture(autouse=True)
def _exact_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def _gradients(model: nn.Module, images: torch.Tensor, mode: str) -> list[torch.Tensor]:
    set_training_mode(model.train(), mode)  # type: ignore[arg-type]
    with deterministic_routing():
        loss = model(images).square().mean()
    return [gradient.cpu() for gradient in torch.autograd.grad(loss, list(model.parameters()))]


@every_kind
def test_evaluation_equals_the_cpus(name: str) -> None:
    model, images = _case(name)
    expected, got = trace(model, images), trace(model.cuda(), images.cuda())
    torch.testing.assert_close(got.logits.cpu(), expected.logits, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got.granularity, expected.granularity, strict=True))


@every_kind
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_gradients_equal_the_cpus(name: str, mode: str) -> None:
    model, images = _case(name)
    expected = _gradients(model, images, mode)
    got = _gradients(model.cuda(), images.cuda(), mode)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()) + 1e-7)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_trains_to_finite_gradients(name: str, dtype: torch.dtype) -> None:
    model, images = (part.cuda() for part in _case(name))
    for mode in ("dense", "sparse"):
        set_training_mode(model.train(), mode)
        with torch.autocast("cuda", dtype=dtype):
            logits = model(images)
        gradients = torch.autograd.grad(logits.float().square().mean(), list(model.parameters()))
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)


@every_kind
def test_compiled_evaluation(name: str) -> None:
    model, images = (part.cuda() for part in _case(name))
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True, dynamic=True)(images)
        torch.testing.assert_close(got, model(images), rtol=1e-4, atol=1e-4)
