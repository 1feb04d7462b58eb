"""The Dynamic Grained Encoder block: timm's pre-norm block with as many queries as each region needs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from dge_kernels import QueryPlan, plan_queries_async, pool_queries, ragged_attention, unpool_queries
from dge_models.attention import attend, input_width, keys_values, refuse_unsupported
from dge_models.dense import pool_coarse_splits, pool_every_split, recombine
from dge_models.fixed_layout import FixedLayout
from dge_models.pvt_block import PyramidBlock
from dge_models.router import Router
from dge_models.routing import Routing, region_grid, straight_through

__all__ = ["DGEBlock", "DropPathMode", "TrainingMode", "set_training_mode"]

TrainingMode = Literal["dense", "sparse"]
DropPathMode = Literal["query", "image"]

_KNOWN = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}; expected one of {', '.join(map(repr, choices))}")


def _make_router(attn: Any, name: str, splits: tuple[int, ...], training_mode: str, drop_path_mode: str) -> Router:
    """The router of a block, once everything else that could be refused has been checked."""
    _one_of("training_mode", training_mode, get_args(TrainingMode))
    _one_of("drop_path_mode", drop_path_mode, get_args(DropPathMode))
    refuse_unsupported(attn, f"{name}.attn")
    weight = attn.proj.weight
    return Router(input_width(attn), splits, device=weight.device, dtype=weight.dtype)


@register_notrace_module
class DGEBlock(Block):
    """A transformer block that keeps every token and shortens only the queries.

    It is timm's ``Block``, with timm's own norms, projections, layer scale, MLP and drop path under timm's
    parameter names, plus ``router.gate``. With every region at the finest split it computes what timm's
    block computes. In training it differentiates through the gates in one of two modes of equal value:
    "dense" computes the queries of every split and gives every gate a gradient (the reference's default),
    "sparse" computes those of the chosen split only and gives the chosen gate a gradient. In evaluation it
    computes the chosen split, differentiably if gradients are enabled.

    Source: Song et al., "Dynamic Grained Encoder for Vision Transformers", NeurIPS 2021, section 3.

    Args:
        *args: What timm's ``Block`` takes.
        splits: Queries per region side, finest first; the first is the region's side in tokens.
        training_mode: "dense" or "sparse".
        drop_path_mode: What drop path drops, "query" (as the reference does) or "image" (as timm does).
        **kwargs: What timm's ``Block`` takes.

    Raises:
        ValueError: A choice is unknown, or `splits` or the attention are not supported.
    """

    def __init__(
        self,
        *args: Any,
        splits: tuple[int, ...] = (4, 2, 1),
        training_mode: TrainingMode = "dense",
        drop_path_mode: DropPathMode = "query",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        router = _make_router(self.attn, "block", splits, training_mode, drop_path_mode)
        self._start_routing(router, training_mode, drop_path_mode)

    @classmethod
    def adopt(
        cls,
        block: nn.Module,
        name: str = "block",
        *,
        splits: tuple[int, ...] = (4, 2, 1),
        training_mode: TrainingMode = "dense",
        drop_path_mode: DropPathMode = "query",
    ) -> DGEBlock:
        """Turn a timm block into a routed one, in place: its parameters, hooks and mode stay as they are.

        Args:
            block: timm's ``Block``, or this package's :class:`PyramidBlock`.
            name: How to call it in errors, such as "blocks.3".
            splits: As in the constructor.
            training_mode: As in the constructor.
            drop_path_mode: As in the constructor.

        Returns:
            `block` itself, now a DGEBlock with a freshly initialised router.

        Raises:
            ValueError: The block is of another kind, or as in the constructor.
        """
        if isinstance(block, cls):
            raise ValueError(f"{name}: is routed already; expected timm's plain Block")
        if type(block) not in (Block, PyramidBlock):
            raise ValueError(
                f"{name}: got {type(block).__name__}; expected timm's plain pre-norm Block (parallel, "
                "post-norm and windowed blocks can't be routed)"
            )
        unknown = sorted({child for child, _ in block.named_children()} - _KNOWN)
        if unknown:
            raise ValueError(f"{name}: has unknown parts {unknown}; expected those of timm's Block")
        router = _make_router(block.attn, name, splits, training_mode, drop_path_mode)
        routed = cast(DGEBlock, block)
        routed.__class__ = cls
        routed._start_routing(router, training_mode, drop_path_mode)
        return routed

    def _start_routing(self, router: Router, training_mode: TrainingMode, drop_path_mode: DropPathMode) -> None:
        self.router = router.train(self.training)
        self.training_mode: TrainingMode = training_mode
        self.drop_path_mode: DropPathMode = drop_path_mode
        # What set_fixed_queries puts here replaces the dynamic choice in evaluation.
        self.fixed_layout: FixedLayout | None = None

    def forward(  # type: ignore[override]  # a routed block has to know the grid
        self,
        x: Tensor,
        grid: tuple[int, int],
        num_prefix_tokens: int = 0,
        *,
        noise: Tensor | None = None,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, Routing]:
        """Run the block.

        Args:
            x: [B, T + H·W, C] tokens, prefix tokens first; any floating dtype.
            grid: (H, W) of the spatial tokens.
            num_prefix_tokens: T.
            noise: Gumbel noise of this step, float32 [B, ⌈H/S⌉, ⌈W/S⌉, n]; drawn here if None. Training only.
            return_routing: Return (tokens, routing) instead of the tokens.

        Returns:
            Tokens of the shape and dtype of `x`.

        Raises:
            ValueError: `noise` is given in evaluation or has another shape.
        """
        if not self.training and noise is not None:
            raise ValueError("noise: got a tensor in evaluation mode; expected None, evaluation takes the argmax")
        if not self.training and self.fixed_layout is not None:
            return self._compute_fixed(x, grid, num_prefix_tokens, return_routing, self.fixed_layout)
        if not self.training and not torch.is_grad_enabled():
            return self._infer(x, grid, num_prefix_tokens, return_routing)
        if noise is None:
            noise = self.router.draw_noise(x.shape[0], grid, x.device)
        routing = self.router(x, grid, num_prefix_tokens, noise)
        dense = self.training and self.training_mode == "dense"
        x = self._compute_every_split(x, routing) if dense else self._compute_chosen_split(x, routing)
        return (x, routing) if return_routing else x

    def forward_routed(
        self, x: Tensor, grid: tuple[int, int], num_prefix_tokens: int = 0, *, noise: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """:meth:`forward` with its routing, hooks included; see there for the arguments."""
        out: tuple[Tensor, Routing] = self(x, grid, num_prefix_tokens, noise=noise, return_routing=True)
        return out

    def _infer(
        self, x: Tensor, grid: tuple[int, int], num_prefix_tokens: int, return_routing: bool
    ) -> Tensor | tuple[Tensor, Routing]:
        splits = self.router.splits
        choice = self.router.choose(x, grid, num_prefix_tokens)
        plan, keys = self._plan_and_keys(x, choice, grid, num_prefix_tokens)
        delta = self._change(pool_queries(x, plan), keys, plan, overwrite=True)
        out = unpool_queries(delta.to(x.dtype), plan, x)
        if not return_routing:
            return out
        gate = F.one_hot(choice.long(), len(splits)).float()
        return out, Routing.from_gate(choice, gate, grid, num_prefix_tokens, splits)

    def _compute_fixed(
        self, x: Tensor, grid: tuple[int, int], num_prefix_tokens: int, return_routing: bool, layout: FixedLayout
    ) -> Tensor | tuple[Tensor, Routing]:
        if (grid, num_prefix_tokens) != (layout.grid, layout.num_prefix_tokens):
            raise ValueError(
                f"images: got a token grid of {grid[0]} × {grid[1]}; expected {layout.grid[0]} × {layout.grid[1]}, "
                "for which set_fixed_queries was called"
            )
        splits = self.router.splits
        logits = self.router.logits(x, grid, num_prefix_tokens)
        choice, source, row = layout(logits)
        queries = pool_every_split(x, grid, num_prefix_tokens, splits)
        queries = queries.gather(1, source.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        delta = self._change(queries, self._keys_values(x, grid), None)
        out = x + delta.gather(1, row.unsqueeze(-1).expand(-1, -1, delta.shape[-1])).to(x.dtype)
        if not return_routing:
            return out
        routing = Routing.from_gate(
            choice, straight_through(logits, choice), grid, num_prefix_tokens, splits, logits.detach()
        )
        computed = torch.full_like(routing.queries, layout.num_queries)
        return out, replace(routing, queries=computed)

    def _compute_chosen_split(self, x: Tensor, routing: Routing) -> Tensor:
        plan, keys = self._plan_and_keys(x, routing.choice, routing.grid, routing.num_prefix_tokens)
        delta = self._change(pool_queries(x, plan), keys, plan)
        delta = delta * _chosen_gates(routing, plan).to(delta.dtype)
        return unpool_queries(delta.to(x.dtype), plan, x)

    def _compute_every_split(self, x: Tensor, routing: Routing) -> Tensor:
        attn: Any = self.attn
        coarse = pool_coarse_splits(x, routing.grid, routing.num_prefix_tokens, routing.splits)
        normed = self.norm1(x)  # for keys, values and the finest queries
        keys = keys_values(attn, normed, routing.grid)
        normed = torch.cat([normed, self.norm1(coarse)], dim=1)
        return recombine(x, self._change(torch.cat([x, coarse], dim=1), keys, None, normed=normed), routing)

    def _keys_values(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        attn: Any = self.attn
        return keys_values(attn, self.norm1(x), grid)

    def _plan_and_keys(
        self, x: Tensor, choice: Tensor, grid: tuple[int, int], num_prefix_tokens: int
    ) -> tuple[QueryPlan, tuple[Tensor, Tensor]]:
        """Keys and values need no plan: a GPU computes them while the host waits for the number of queries."""
        future = plan_queries_async(choice, self.router.splits, grid=grid, num_prefix_tokens=num_prefix_tokens)
        keys = self._keys_values(x, grid)
        return future.result(), keys

    def _change(
        self,
        queries: Tensor,
        keys: tuple[Tensor, Tensor],
        plan: QueryPlan | None,
        *,
        normed: Tensor | None = None,
        overwrite: bool = False,
    ) -> Tensor:
        """What the two branches add to the queries: packed [Q, C] with a plan, else [B, F, C].

        `normed` is LN₁ of the queries, where the caller has it.
        With `overwrite` the result takes the place of `queries`, which saves two allocations of that size;
        on a CPU they cost as much as the additions.
        """
        attn: Any = self.attn
        kernel = partial(_full_attention if plan is None else partial(ragged_attention, plan=plan), scale=attn.scale)
        update = self.ls1(attend(attn, self.norm1(queries) if normed is None else normed, *keys, kernel))
        update = self._drop(self.drop_path1, update, plan)
        hidden = queries.add_(update) if overwrite else queries + update
        mlp = self._drop(self.drop_path2, self.ls2(self.mlp(self.norm2(hidden))), plan)
        return torch.add(update, mlp, out=hidden) if overwrite else update + mlp

    def _drop(self, drop_path: nn.Module, update: Tensor, plan: QueryPlan | None) -> Tensor:
        """Stochastic depth; timm's module drops along the first axis of what it is given."""
        if not self.training or isinstance(drop_path, nn.Identity):
            return update
        if self.drop_path_mode == "query":
            dropped: Tensor = drop_path(update.flatten(0, -2)).view_as(update)
            return dropped
        if plan is None:
            whole: Tensor = drop_path(update)
            return whole
        kept: Tensor = drop_path(update.new_ones(plan.cu_seqlens.shape[0] - 1, 1))
        return update * kept[plan.patches[:, 0].long()]


def _full_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of [B, F, h, d] over [B, N, h, d]."""
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def _chosen_gates(routing: Routing, plan: QueryPlan) -> Tensor:
    """The chosen gate of each query's region, 1 for prefix tokens: float32 [Q, 1], all ones in value."""
    rows, cols = region_grid(routing.grid, routing.splits)
    size = routing.splits[0]
    gate = routing.gate.gather(-1, routing.choice.long().unsqueeze(-1)).flatten()
    image, y, x, _ = plan.patches.long().unbind(1)
    region = (image * rows + y // size) * cols + x // size
    region = torch.where(y < 0, gate.shape[0], region)
    return torch.cat([gate, gate.new_ones(1)])[region].unsqueeze(1)


def set_training_mode(model: nn.Module, mode: TrainingMode) -> None:
    """Choose how a model's routed blocks train.

    Args:
        model: Any module that holds DGE blocks.
        mode: "dense" or "sparse", see :class:`DGEBlock`.

    Raises:
        ValueError: `mode` is unknown, or the model has no routed block.
    """
    _one_of("mode", mode, get_args(TrainingMode))
    blocks = [module for module in model.modules() if isinstance(module, DGEBlock)]
    if not blocks:
        raise ValueError(f"model: {type(model).__name__} has no routed block; expected a DGE model")
    for block in blocks:
        block.training_mode = mode
