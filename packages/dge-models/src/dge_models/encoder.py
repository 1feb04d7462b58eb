"""The Dynamic Grained Encoder block: timm's pre-norm block with as many queries as each region needs."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal, cast, get_args

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from dge_kernels import QueryPlan, plan_queries_async, pool_queries, ragged_attention, unpool_queries
from dge_models.attention import (
    TIMM_ATTENTION,
    Kernel,
    KnownAttention,
    attend,
    full_attention,
    input_width,
    keys_values,
    refuse_hooks,
    refuse_unsupported,
)
from dge_models.every_split import every_patch, pool_coarse_splits, recombine
from dge_models.plain_block import run_plain, without_parts
from dge_models.projections import has_hooks, placement
from dge_models.router import Router
from dge_models.routing import Routing, region_grid, straight_through
from dge_models.static_layout import FixedLayout, take_rows

__all__ = ["DGEBlock", "DropPathMode", "TrainingMode", "set_training_mode"]

TrainingMode = Literal["dense", "sparse"]
DropPathMode = Literal["query", "image"]

Heads = tuple[Tensor, ...]
"""What queries read: keys and values, or what a kind of attention has in their place."""

Patches = Callable[[], Tensor]


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}; expected one of {', '.join(map(repr, choices))}")


def _make_router(
    kind: type[DGEBlock], attn: Any, name: str, splits: tuple[int, ...], training_mode: str, drop_path_mode: str
) -> Router:
    """The router of a block, once everything else that could be refused has been checked."""
    _one_of("training_mode", training_mode, get_args(TrainingMode))
    _one_of("drop_path_mode", drop_path_mode, get_args(DropPathMode))
    refuse_unsupported(attn, f"{name}.attn", kind.attention)
    device, dtype = placement(attn)
    return Router(input_width(attn), splits, device=device, dtype=dtype)


@register_notrace_module
class DGEBlock(Block):
    """A transformer block that keeps every token and shortens only the queries.

    It is timm's ``Block``, with timm's own norms, projections, layer scale, MLP and drop path under timm's
    parameter names, plus ``router.gate``. With every region at the finest split it computes what timm's
    block computes. In training it differentiates through the gates in one of two modes of equal value:
    "dense" computes the queries of every split and gives every gate a gradient (the reference's default),
    "sparse" computes those of the chosen split only and gives the chosen gate a gradient. In evaluation it
    computes the chosen split, differentiably if gradients are enabled.

    Another kind of pre-norm block is routed by a subclass that sets `plain`, `parts` and `attention` and overrides
    :meth:`make_keys`, :meth:`attend`, :meth:`scale_attention` and :meth:`scale_mlp` where it differs. Defining it is
    enough for :meth:`adopt` to know it.

    Source: Song et al., "Dynamic Grained Encoder for Vision Transformers", NeurIPS 2021, section 3.

    Args:
        *args: What timm's ``Block`` takes.
        splits: Queries per region side, finest first; the first is the region's side in tokens.
        training_mode: "dense" or "sparse".
        drop_path_mode: What drop path drops, "query" (as the reference does) or "image" (as timm does).
        **kwargs: What timm's ``Block`` takes.

    Attributes:
        plain: The class of blocks that become routed ones of this class.
        parts: Names of the modules that such a block may have.
        attention: What is known of its attention.

    Raises:
        ValueError: A choice is unknown, or `splits` or the attention are not supported.
    """

    plain: ClassVar[type[nn.Module]] = Block
    parts: ClassVar[Set[str]] = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}
    attention: ClassVar[KnownAttention] = TIMM_ATTENTION
    _kinds: ClassVar[dict[type[nn.Module], type[DGEBlock]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "plain" in vars(cls):
            cls._kinds[cls.plain] = cls

    def __init__(
        self,
        *args: Any,
        splits: tuple[int, ...] = (4, 2, 1),
        training_mode: TrainingMode = "dense",
        drop_path_mode: DropPathMode = "query",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        router = _make_router(type(self), self.attn, "block", splits, training_mode, drop_path_mode)
        self._start_routing(router, "block", training_mode, drop_path_mode)

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
        """Turn a plain block into a routed one, in place: its parameters, hooks and mode stay as they are.

        Args:
            block: timm's ``Block``, or of another class that a subclass routes.
            name: How to call it in errors, such as "blocks.3".
            splits: As in the constructor.
            training_mode: As in the constructor.
            drop_path_mode: As in the constructor.

        Returns:
            `block` itself, now of the routed class for its kind, with a freshly initialised router.

        Raises:
            ValueError: The block is of another kind, or as in the constructor.
        """
        if isinstance(block, DGEBlock):
            raise ValueError(f"{name}: is routed already; expected timm's plain Block")
        if "forward" in vars(block):
            raise ValueError(
                f"{name}: got a block whose forward is replaced, as offloading does; expected one as timm made it, "
                "convert first and offload afterwards"
            )
        kind = DGEBlock if type(block) is Block else cls._kinds.get(type(block))
        if kind is None:
            raise ValueError(
                f"{name}: got {type(block).__name__}; expected timm's plain pre-norm Block (parallel, "
                "post-norm and windowed blocks can't be routed)"
            )
        unknown = sorted({child for child, _ in block.named_children()} - kind.parts)
        if unknown:
            raise ValueError(f"{name}: has unknown parts {unknown}; expected those of timm's {kind.plain.__name__}")
        router = _make_router(kind, block.attn, name, splits, training_mode, drop_path_mode)
        routed = cast(DGEBlock, block)
        routed.__class__ = kind
        routed._start_routing(router, name, training_mode, drop_path_mode)
        return routed

    def _start_routing(
        self, router: Router, name: str, training_mode: TrainingMode, drop_path_mode: DropPathMode
    ) -> None:
        self.router = router.train(self.training)
        self._called = name  # in errors
        self.training_mode: TrainingMode = training_mode
        self.drop_path_mode: DropPathMode = drop_path_mode
        # What set_fixed_queries puts here replaces the dynamic choice in evaluation.
        self.fixed_layout: FixedLayout | None = None

    def make_keys(self, normed: Tensor, grid: tuple[int, int], positions: Any) -> Heads:
        """Keys and values of all tokens.

        Args:
            normed: [B, T + H·W, C], after the first norm.
            grid: (H, W).
            positions: What the model gave :meth:`forward`.

        Returns:
            Keys and values, [B, M, h, d] each; M is the number of tokens, or what a reduction leaves of them.
        """
        return keys_values(cast(Any, self.attn), normed)

    def make_kernel(self, plan: QueryPlan | None) -> Kernel:
        """What queries do with keys and values: :meth:`attend` calls it.

        Args:
            plan: Of packed queries; None where every image has as many.
        """
        attn: Any = self.attn
        if plan is None:
            return partial(full_attention, scale=attn.scale)
        return partial(ragged_attention, plan=plan, scale=attn.scale)

    def attend(self, normed: Tensor, keys: Heads, kernel: Kernel, positions: Any, patches: Patches) -> Tensor:
        """What attention adds to the queries, from their projection to that of the output.

        Args:
            normed: Queries after the first norm, packed [Q, C] or [B, F, C].
            keys: From :meth:`make_keys`.
            kernel: From :meth:`make_kernel`; maps q [..., h, d], keys and values to [..., h, d].
            positions: What the model gave :meth:`forward`.
            patches: Returns where the queries are: int [Q, 3], [F, 3] or [B, F, 3], row, column and side in tokens of
                each query's patch, whole ones even where the grid's edge clips them; row < 0 for prefix tokens.

        Returns:
            A tensor of the shape of `normed`.
        """
        k, v = keys
        return attend(cast(Any, self.attn), normed, k, v, kernel)

    def scale_attention(self, update: Tensor) -> Tensor:
        """Layer scale of what attention adds."""
        scaled: Tensor = self.ls1(update)
        return scaled

    def scale_mlp(self, update: Tensor) -> Tensor:
        """Layer scale of what the MLP adds."""
        scaled: Tensor = self.ls2(update)
        return scaled

    def __getstate__(self) -> dict[str, Any]:
        return without_parts(self)

    def forward(  # type: ignore[override]  # a routed block has to know the grid
        self,
        x: Tensor,
        grid: tuple[int, int],
        num_prefix_tokens: int = 0,
        *,
        positions: Any = None,
        noise: Tensor | None = None,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, Routing]:
        """Run the block.

        Args:
            x: [B, T + H·W, C] tokens, prefix tokens first; any floating dtype.
            grid: (H, W) of the spatial tokens.
            num_prefix_tokens: T.
            positions: What blocks of this kind need to know of places beside the tokens, such as rotary embeddings.
            noise: Gumbel noise of this step, float32 [B, ⌈H/S⌉, ⌈W/S⌉, n]; drawn here if None. Training only.
            return_routing: Return (tokens, routing) instead of the tokens.

        Returns:
            Tokens of the shape and dtype of `x`.

        Raises:
            RuntimeError: There are hooks on the attention as a whole, on its map, or with fixed queries on the router:
                they are not called.
            ValueError: `noise` is given in evaluation or has another shape.
        """
        if not (self.training or torch.is_grad_enabled() or return_routing or type(self) is not DGEBlock):
            out = run_plain(self, x, grid, num_prefix_tokens) if noise is None and self.fixed_layout is None else None
            if out is not None:
                return out
        refuse_hooks(self.attn, f"{self._called}.attn")
        if not self.training and noise is not None:
            raise ValueError("noise: got a tensor in evaluation mode; expected None, evaluation takes the argmax")
        if not self.training and self.fixed_layout is not None:
            return self._compute_fixed(x, grid, num_prefix_tokens, positions, return_routing, self.fixed_layout)
        if not self.training and not torch.is_grad_enabled() and not has_hooks(self.router):
            return self._infer(x, grid, num_prefix_tokens, positions, return_routing)
        if noise is None:
            noise = self.router.draw_noise(x.shape[0], grid, x.device)
        routing = self.router(x, grid, num_prefix_tokens, noise)
        dense = self.training and self.training_mode == "dense"
        compute = self._compute_every_split if dense else self._compute_chosen_split
        x = compute(x, routing, positions)
        return (x, routing) if return_routing else x

    def forward_routed(
        self,
        x: Tensor,
        grid: tuple[int, int],
        num_prefix_tokens: int = 0,
        *,
        positions: Any = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        """:meth:`forward` with its routing, hooks included; see there for the arguments."""
        out: tuple[Tensor, Routing] = self(
            x, grid, num_prefix_tokens, positions=positions, noise=noise, return_routing=True
        )
        return out

    def _infer(
        self, x: Tensor, grid: tuple[int, int], num_prefix_tokens: int, positions: Any, return_routing: bool
    ) -> Tensor | tuple[Tensor, Routing]:
        splits = self.router.splits
        choice = self.router.choose(x, grid, num_prefix_tokens)
        plan, keys = self._plan_and_keys(x, choice, grid, num_prefix_tokens, positions)
        delta = self._change(pool_queries(x, plan), keys, plan, positions, _of_plan(plan), overwrite=True)
        out = unpool_queries(delta.to(x.dtype), plan, x)
        if not return_routing:
            return out
        gate = F.one_hot(choice.long(), len(splits)).float()
        return out, Routing.from_gate(choice, gate, grid, num_prefix_tokens, splits)

    def _compute_fixed(
        self,
        x: Tensor,
        grid: tuple[int, int],
        num_prefix_tokens: int,
        positions: Any,
        return_routing: bool,
        layout: FixedLayout,
    ) -> Tensor | tuple[Tensor, Routing]:
        if (grid, num_prefix_tokens) != (layout.grid, layout.num_prefix_tokens):
            raise ValueError(
                f"images: got a token grid of {grid[0]} × {grid[1]}; expected {layout.grid[0]} × {layout.grid[1]}, "
                "for which set_fixed_queries was called"
            )
        if has_hooks(self.router):
            raise RuntimeError(
                f"{self._called}.router: got a hook or another forward; expected none with fixed queries, which take "
                f"the logits alone. They are the output of {self._called}.router.gate"
            )
        splits = self.router.splits
        pooled = layout.pool(x)
        logits = self.router.logits_of(pooled.means)
        places = layout(logits)
        queries = layout.take(x, pooled, places)
        keys = self.make_keys(self.norm1(x), grid, positions)

        def patches() -> Tensor:
            return every_patch(grid, num_prefix_tokens, splits, x.device)[layout.source(places)]

        delta = self._change(queries, keys, None, positions, patches)
        out = x + take_rows(delta.to(x.dtype), places.row)
        if not return_routing:
            return out
        gate = straight_through(logits, places.choice)
        routing = Routing.from_gate(places.choice, gate, grid, num_prefix_tokens, splits, logits.detach())
        computed = torch.full_like(routing.queries, layout.num_queries)
        return out, replace(routing, queries=computed)

    def _compute_chosen_split(self, x: Tensor, routing: Routing, positions: Any) -> Tensor:
        plan, keys = self._plan_and_keys(x, routing.choice, routing.grid, routing.num_prefix_tokens, positions)
        delta = self._change(pool_queries(x, plan), keys, plan, positions, _of_plan(plan))
        delta = delta * _chosen_gates(routing, plan).to(delta.dtype)
        return unpool_queries(delta.to(x.dtype), plan, x)

    def change_every_split(self, x: Tensor, grid: tuple[int, int], num_prefix_tokens: int, positions: Any) -> Tensor:
        """What the block adds to the query of every patch of every split.

        Args:
            x: [B, T + H·W, C] tokens, prefix tokens first.
            grid: (H, W).
            num_prefix_tokens: T.
            positions: As in :meth:`forward`.

        Returns:
            [B, T + Σ ⌈H/p⌉·⌈W/p⌉, C] over the patch sides p, in the order of
            :func:`~dge_models.every_split.pool_every_split`.
        """
        where = (grid, num_prefix_tokens, self.router.splits)
        coarse = pool_coarse_splits(x, *where)
        normed = self.norm1(x)  # for keys, values and the finest queries
        keys = self.make_keys(normed, grid, positions)
        normed = torch.cat([normed, self.norm1(coarse)], dim=1)
        queries, patches = torch.cat([x, coarse], dim=1), partial(every_patch, *where, x.device)
        return self._change(queries, keys, None, positions, patches, normed=normed)

    def _compute_every_split(self, x: Tensor, routing: Routing, positions: Any) -> Tensor:
        change = self.change_every_split(x, routing.grid, routing.num_prefix_tokens, positions)
        return recombine(x, change, routing)

    def _plan_and_keys(
        self, x: Tensor, choice: Tensor, grid: tuple[int, int], num_prefix_tokens: int, positions: Any
    ) -> tuple[QueryPlan, Heads]:
        """Keys and values need no plan: a GPU computes them while the host waits for the number of queries."""
        future = plan_queries_async(choice, self.router.splits, grid=grid, num_prefix_tokens=num_prefix_tokens)
        keys = self.make_keys(self.norm1(x), grid, positions)
        return future.result(), keys

    def _change(
        self,
        queries: Tensor,
        keys: Heads,
        plan: QueryPlan | None,
        positions: Any,
        patches: Patches,
        *,
        normed: Tensor | None = None,
        overwrite: bool = False,
    ) -> Tensor:
        """What the two branches add to the queries: packed [Q, C] with a plan, else [B, F, C].

        `normed` is LN₁ of the queries, where the caller has it.
        With `overwrite` the result takes the place of `queries`, which saves two allocations of that size;
        on a CPU they cost as much as the additions.
        """
        kernel = self.make_kernel(plan)
        normed = self.norm1(queries) if normed is None else normed
        update = self.scale_attention(self.attend(normed, keys, kernel, positions, patches))
        update = self._drop(self.drop_path1, update, plan)
        hidden = queries.add_(update) if overwrite else queries + update
        if plan is None:  # flat: ONNX Runtime would fuse it with the addition before it, which is slower than both
            normed = torch.unflatten(self.norm2(hidden.flatten(0, 1)), 0, hidden.shape[:2])
        else:
            normed = self.norm2(hidden)
        mlp = self._drop(self.drop_path2, self.scale_mlp(self.mlp(normed)), plan)
        return torch.add(update, mlp, out=hidden) if overwrite else update + mlp

    def _drop(self, drop_path: nn.Module, update: Tensor, plan: QueryPlan | None) -> Tensor:
        """Stochastic depth; timm's module drops along the first axis of what it is given."""
        if self.training and not isinstance(drop_path, nn.Identity):
            if self.drop_path_mode == "query":
                dropped: Tensor = drop_path(update.flatten(0, -2)).view_as(update)
                return dropped
            if plan is not None:
                kept: Tensor = drop_path(update.new_ones(plan.cu_seqlens.shape[0] - 1, 1))
                return update * kept[plan.patches[:, 0].long()]
        whole: Tensor = drop_path(update)
        return whole


def _of_plan(plan: QueryPlan) -> Patches:
    return lambda: plan.patches[:, 1:]


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
