"""What coarse splits would do to a model's output, region by region, from gradients and without labels."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dge_models.encoder import DGEBlock
from dge_models.evaluating import evaluating
from dge_models.every_split import coarse_differences
from dge_models.macs import model_macs, token_grid
from dge_models.routed import routed_blocks
from dge_models.router import region_means
from dge_models.routing import count_queries

__all__ = ["LayerDamage", "Reads", "has_classes", "measure_damage"]

Reads = Literal["class", "tokens"]


@dataclass(frozen=True)
class LayerDamage:
    """What coarser splits cost and save in one routed block, for R regions.

    Attributes:
        means: [R, C], the regions' mean tokens.
        moved: [R, n − 1, P], by how much the output moves along each of P random directions, to first order, when a
            region goes from each split to the next coarser one.
        saved: [R, n − 1], the share of the model's MACs that this saves.
    """

    means: Tensor
    moved: Tensor
    saved: Tensor


@dataclass(frozen=True)
class _Call:
    """A routed block's call.

    Attributes:
        block: The block.
        grid: (H, W).
        num_prefix_tokens: T.
        means: [B, Hr, Wr, C], the regions' mean tokens.
        differences: [B, H, W, C] per split but the finest, what it changes compared with the next finer one.
        output: [B, T + H·W, C], with its graph.
    """

    block: DGEBlock
    grid: tuple[int, int]
    num_prefix_tokens: int
    means: Tensor
    differences: list[Tensor]
    output: Tensor

    def moved(self, gradient: Tensor) -> Tensor:
        """[B, Hr, Wr, n − 1], by how much the scalar moves whose gradient this is."""
        spatial = torch.unflatten(gradient[:, self.num_prefix_tokens :], 1, self.grid)
        products = torch.stack([(spatial * each).sum(-1, dtype=torch.float64) for each in self.differences], 1)
        size = self.block.router.splits[0]
        return F.avg_pool2d(products, size, ceil_mode=True, divisor_override=1).permute(0, 2, 3, 1).cpu()

    def saved(self, share: float) -> Tensor:
        """[B, Hr, Wr, n − 1], what each split saves compared with the next finer one; `share` is a query's cost."""
        queries = count_queries(self.grid, self.block.router.splits, torch.device("cpu")).double()
        return ((queries[..., :-1] - queries[..., 1:]) * share).expand(len(self.means), -1, -1, -1)


def measure_damage(
    model: Any, images: Tensor, projections: int, reads: Reads, generator: torch.Generator
) -> list[LayerDamage]:
    """The damage of every split but the finest, in every region of every routed block.

    One forward pass with every region at its finest split, what the other splits would have given beside it, and one
    backward pass per projection.

    Args:
        model: With routed blocks of two splits or more; unchanged afterwards.
        images: [B, C, H, W], on the model's device.
        projections: P, random directions of the output.
        reads: What is read of the output, see :func:`unit_outputs`.
        generator: Draws the directions, on the CPU.

    Returns:
        One per routed block, in network order, float64 on the CPU.
    """
    with evaluating(model), _finest(model), torch.enable_grad():
        with _recorded_calls(model) as calls:
            # Images that need a gradient make all tokens need one, whatever weights are frozen.
            outputs = unit_outputs(model, images.detach().requires_grad_(), reads)
        moved: list[list[Tensor]] = [[] for _ in calls]
        for left in reversed(range(projections)):
            target = torch.stack([_project(output, generator) for output in outputs]).sum()
            gradients = torch.autograd.grad(target, [call.output for call in calls], retain_graph=left > 0)
            for call, gradient, of_layer in zip(calls, gradients, moved, strict=True):
                of_layer.append(call.moved(gradient))
    macs = model_macs(model, token_grid(model, images))
    layers = [layer for layer, routed in zip(macs.layers, macs.routed, strict=True) if routed]
    return [
        LayerDamage(
            call.means.flatten(0, 2),
            torch.stack(of_layer, -1).flatten(0, 2),
            call.saved(layer.per_query / macs.static).flatten(0, 2),
        )
        for call, layer, of_layer in zip(calls, layers, moved, strict=True)
    ]


def unit_outputs(model: Any, images: Tensor, reads: Reads) -> list[Tensor]:
    """What a model says of images, as vectors of length 1, so that squared distances are comparable.

    Args:
        model: In evaluation.
        images: [B, C, H, W].
        reads: "class": the square roots of the class probabilities, whose squared distances are those of Fisher's
            metric; without a head the pooled features. "tokens": the pooled features and all tokens.

    Returns:
        Tensors [B, M, C], each as important as the others, whatever its M.
    """
    features = model.forward_features(images)
    if reads == "class" and has_classes(model):
        logits = model.forward_head(features)
        return [(0.5 * _wide(logits).log_softmax(-1)).exp().unsqueeze(1)]
    pooled = model.forward_head(features, pre_logits=True)
    prefix: int = model.num_prefix_tokens
    # Three axes: the model does not pool.
    outputs = [pooled.unsqueeze(1) if pooled.ndim == 2 else features[:, : prefix or None]]
    if reads == "tokens":
        outputs.append(features[:, prefix:])
    return [F.normalize(_wide(output), dim=-1) for output in outputs]


def has_classes(model: nn.Module) -> bool:
    """Whether a model has a head that gives logits."""
    return bool(getattr(model, "num_classes", 0) > 0)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _project(output: Tensor, generator: torch.Generator) -> Tensor:
    """A random projection of each image's output, summed over images."""
    direction = torch.randn(output.shape, generator=generator).to(output)
    return (output * direction).sum() / math.sqrt(output.shape[1])


@contextmanager
def _finest(model: nn.Module) -> Iterator[None]:
    """Inside, every region gets the finest split, and no gradient flows through the routers."""
    gates = [block.router.gate for block in routed_blocks(model)]
    before = [(gate.weight.detach().clone(), gate.bias.detach().clone()) for gate in gates]
    with torch.no_grad():
        for gate in gates:
            gate.weight.zero_()
            gate.bias.zero_()
            gate.bias[0] = 1
    try:
        yield
    finally:
        with torch.no_grad():
            for gate, (weight, bias) in zip(gates, before, strict=True):
                gate.weight.copy_(weight)
                gate.bias.copy_(bias)


@contextmanager
def _recorded_calls(model: nn.Module) -> Iterator[list[_Call]]:
    """Inside, every routed block's call is noted, with what its coarse splits would change."""
    calls: list[_Call] = []

    def record(block: Any, args: Sequence[Any], kwargs: dict[str, Any], output: Tensor) -> None:
        given = inspect.signature(block.forward).bind(*args, **kwargs)
        given.apply_defaults()
        x, grid, prefix = (given.arguments[name] for name in ("x", "grid", "num_prefix_tokens"))
        splits = block.router.splits
        with torch.no_grad():
            means = region_means(torch.unflatten(x[:, prefix:], 1, grid), splits[0])
            change = block.change_every_split(x, grid, prefix, given.arguments["positions"])
            differences = coarse_differences(change, grid, prefix, splits)
        calls.append(_Call(block, grid, prefix, means.double().cpu(), differences, output))

    handles = [block.register_forward_hook(record, with_kwargs=True) for block in routed_blocks(model)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
