"""A plain model and a routed one of the same weights at its finest split, whose layers are then changed alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
from small_models import SMALL, SMALL_PYRAMID
from torch import nn

from dge_models import deterministic_routing, from_timm, set_fixed_queries, set_training_mode
from dge_models.routed import routed_blocks

KINDS = ("deit", "pvt")
PROJECTIONS = {"deit": ("qkv", "proj"), "pvt": ("q", "kv", "proj")}
Change = Callable[[nn.Module, str], None]


def pair(kind: str) -> tuple[Any, Any]:
    """The plain model and the routed one, in evaluation."""
    if kind == "deit":
        plain = timm.create_model("deit_tiny_patch16_224", **SMALL).eval()
        _spread_biases(plain)
        return plain, from_timm(plain)
    plain = timm.create_model("pvt_tiny_256", **SMALL_PYRAMID).eval()
    _spread_biases(plain)
    routed = timm.create_model("pvt_dge_s124_tiny_256", **SMALL_PYRAMID).eval()
    assert not routed.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    with torch.no_grad():
        for block in routed_blocks(routed):
            block.router.gate.weight.zero_()
    return plain, routed


def _spread_biases(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)


def images(kind: str) -> torch.Tensor:
    """Two of the size that the small models of this kind take."""
    size = 64 if "pvt" in kind else 32
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))


def projections(model: nn.Module, kind: str) -> Iterator[tuple[nn.Module, str]]:
    """Each attention and the name of one of its projections, then each MLP with its layers' names."""
    for name, module in list(model.named_modules()):
        if name.endswith(".attn"):
            yield from ((module, part) for part in PROJECTIONS[kind])
        elif name.endswith(".mlp"):
            yield from ((module, part) for part in ("fc1", "fc2"))


def change(model: nn.Module, kind: str, how: Change) -> None:
    """Change every projection of every block, with the same random numbers whatever else the model has."""
    for owner, name in projections(model, kind):
        torch.manual_seed(5)
        how(owner, name)


def assert_same(plain: Any, routed: Any, pixels: torch.Tensor) -> None:
    """Equal outputs at the finest split: dynamic without and with gradients, and with fixed shapes."""
    expected = plain.eval()(pixels).detach()
    routed.eval()
    with torch.no_grad():
        torch.testing.assert_close(routed(pixels), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(routed(pixels), expected, atol=1e-5, rtol=0)
    assert_same_fixed(routed, expected, pixels)


def assert_same_fixed(routed: Any, expected: torch.Tensor, pixels: torch.Tensor, atol: float = 1e-5) -> None:
    """Equal outputs with fixed shapes."""
    set_fixed_queries(routed, 1.0)
    with torch.no_grad():
        torch.testing.assert_close(routed(pixels), expected, atol=atol, rtol=0)
    for block in routed_blocks(routed):
        block.fixed_layout = None


def trained(model: Any, pixels: torch.Tensor, mode: str = "dense", steps: int = 2) -> dict[str, torch.Tensor]:
    """What steps of plain SGD make of the trainable parameters, without Gumbel noise."""
    model.train()
    if routed_blocks(model):
        set_training_mode(model, mode)  # type: ignore[arg-type]
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    optimizer = torch.optim.SGD(own.values(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        with deterministic_routing():
            model(pixels).square().mean().backward()
        optimizer.step()
    return {name: parameter.detach() - before[name] for name, parameter in own.items()}


def assert_trains_alike(plain: Any, routed: Any, pixels: torch.Tensor, mode: str) -> None:
    """The same steps for every parameter that both have, and a step for each of them."""
    expected, got = trained(plain, pixels), trained(routed, pixels, mode)
    missing = [name for name in expected if name not in got]
    assert not missing
    for name, step in expected.items():
        torch.testing.assert_close(got[name], step, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
