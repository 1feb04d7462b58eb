"""The operators against what bounds them: a copy, a read (a sum), torch's attention.

    python benchmarks/operators.py [--device cpu|cuda] [--dtype float32|bfloat16] [--rounds N] [--output FILE.json]

Every comparison is made in one run, its candidates in turns; the ratio of the medians is what counts.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from timing import in_turns, machine
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

import dge_kernels as dk

Row = dict[str, object]
GRID = (16, 16)


def moved_bytes(batch: int, device: str, dtype: torch.dtype, rounds: int) -> list[Row]:
    """pool, unpool and route: bytes per second, as a share of what a copy of all tokens reaches."""
    channels = 384
    x = torch.randn(batch, 257, channels, device=device, dtype=dtype)
    plan = dk.plan_queries(torch.randint(0, 3, (batch, 4, 4), device=device), num_prefix_tokens=1)
    delta = torch.randn(plan.total, channels, device=device, dtype=dtype)
    weight, bias = torch.randn(3, channels, device=device), torch.zeros(3, device=device)
    target = torch.empty_like(x)
    calls = {
        "copy": lambda: target.copy_(x),
        "copy into new memory": lambda: x.clone(),
        "read": lambda: x.sum(),
        "pool_queries": lambda: dk.pool_queries(x, plan),
        "unpool_queries": lambda: dk.unpool_queries(delta, plan, x),
        "route": lambda: dk.route(x, weight, bias, grid=GRID, num_prefix_tokens=1),
    }
    dense, ragged = x.numel() * x.element_size(), delta.numel() * delta.element_size()
    moved = dict(zip(calls, (2 * dense, 2 * dense, dense, dense + ragged, 2 * dense + ragged, dense), strict=True))
    medians = in_turns(calls, device, rounds)
    speed = {name: moved[name] / seconds for name, seconds in medians.items()}
    return [
        {
            f"{batch} images": name,
            "ms": 1e3 * medians[name],
            "GB/s": speed[name] / 1e9,
            "of a copy's": speed[name] / speed["copy"],
            "of a new copy's": speed[name] / speed["copy into new memory"],
            "time / a read's": medians[name] / medians["read"],
        }
        for name in calls
    ]


def planning(device: str, rounds: int) -> list[Row]:
    """plan_queries for 64 images, its wait for the device included; on CUDA also what the device itself does."""
    choice = torch.randint(0, 3, (64, 4, 4), device=device)
    calls = {"plan_queries, 64 images": lambda: dk.plan_queries(choice, num_prefix_tokens=1)}
    if device == "cuda":
        calls["its work on the device alone"] = _recorded_plan(choice)
    medians = in_turns(calls, device, 10 * rounds)
    return [{"what": name, "us": 1e6 * seconds} for name, seconds in medians.items()]


def _recorded_plan(choice: torch.Tensor) -> Callable[[], None]:
    """Replays the launches of a plan from a CUDA graph, without the host's part of them."""
    arguments = ([4, 2, 1], *GRID, 1)
    total = dk.plan_queries(choice, num_prefix_tokens=1).total
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sums, _ = torch.ops.dge_kernels.count_queries(choice, *arguments)
        torch.ops.dge_kernels.write_patches(choice, sums, *arguments, total)
    return graph.replay


def attention(device: str, dtype: torch.dtype, rounds: int) -> list[Row]:
    """ragged_attention against torch's attention called once per image."""
    rows: list[Row] = []
    for batch in (1, 8, 32):
        for channels in (192, 384, 768):
            for name, low in (("mixed", 0), ("coarse", 2)):
                choice = torch.randint(low, 3, (batch, 4, 4), device=device)
                plan = dk.plan_queries(choice, num_prefix_tokens=1)
                q = torch.randn(plan.total, channels // 64, 64, device=device, dtype=dtype)
                k, v = torch.randn(batch, 257, 2, channels // 64, 64, device=device, dtype=dtype).unbind(2)
                lengths = plan.lengths.tolist()

                def per_image(q=q, k=k, v=v, lengths=lengths) -> torch.Tensor:  # type: ignore[no-untyped-def]
                    images = zip(q.split(lengths), k, v, strict=True)
                    parts = [scaled_dot_product_attention(*(t.transpose(0, 1) for t in image)) for image in images]
                    return torch.cat([part.transpose(0, 1) for part in parts])

                calls = {
                    "ours": lambda q=q, k=k, v=v, plan=plan: dk.ragged_attention(q, k, v, plan),
                    "loop": per_image,
                }
                if device == "cuda" and dtype != torch.float32:
                    calls["varlen"] = _varlen_alone(q, k, v, plan)
                medians = in_turns(calls, device, rounds)
                rows.append(
                    {
                        "what": f"attention, {batch} x {channels} channels, {name}",
                        "queries": plan.total,
                        "ms": 1e3 * medians["ours"],
                        "GFLOP/s": 4e-9 * plan.total * 257 * channels / medians["ours"],
                        "loop / ours": medians["loop"] / medians["ours"],
                    }
                )
                if "varlen" in medians:
                    rows[-1]["varlen / ours"] = medians["varlen"] / medians["ours"]
    return rows


def _varlen_alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: dk.QueryPlan) -> Callable[[], object]:
    """torch's kernel with everything that it needs at hand."""
    keys, values = (t.flatten(0, 1).contiguous() for t in (k, v))
    ends = torch.arange(len(k) + 1, device=q.device, dtype=torch.int32) * k.shape[1]
    return lambda: varlen_attn(q, keys, values, plan.cu_seqlens, ends, plan.max_seqlen, k.shape[1])


def fusion(device: str, dtype: torch.dtype, rounds: int) -> list[Row]:
    """What one pass that reads x once and returns LN(x), the queries and LN(queries) could save, of a block's time."""
    batch, channels = (256, 384) if device == "cuda" else (32, 384)
    x = torch.randn(batch, 257, channels, device=device, dtype=dtype)
    plan = dk.plan_queries(torch.randint(0, 3, (batch, 4, 4), device=device), num_prefix_tokens=1)
    norm = functools.partial(layer_norm, normalized_shape=(channels,))
    router, w_q, w_kv, w_out, w_up, w_down = (
        torch.randn(shape, device=device, dtype=dtype) / channels**0.5
        for shape in ((3, channels), *((n * channels, channels) for n in (1, 2, 1, 4)), (channels, 4 * channels))
    )

    def separate() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        queries = dk.pool_queries(x, plan)
        return norm(x), queries, norm(queries)

    def block() -> torch.Tensor:
        choice = dk.route(x, router, grid=GRID, num_prefix_tokens=1)
        plan = dk.plan_queries(choice, num_prefix_tokens=1)
        queries = dk.pool_queries(x, plan)
        k, v = linear(norm(x), w_kv).unflatten(-1, (2, -1, 64)).unbind(2)
        q = linear(norm(queries), w_q).unflatten(-1, (-1, 64))
        update = linear(dk.ragged_attention(q, k, v, plan).flatten(1), w_out)
        update = update + linear(gelu(linear(norm(queries + update), w_up)), w_down)
        return dk.unpool_queries(update, plan, x)

    target = torch.empty_like(x)
    calls = {"block": block, "separate": separate, "copy": lambda: target.copy_(x)}
    medians = in_turns(calls, device, rounds)
    # Fused, it would move x in, and LN(x), the queries and LN(queries) out, at best as fast as a copy moves bytes.
    fused = medians["copy"] * (x.numel() + plan.total * channels) / x.numel()
    return [
        {"what": f"a block, {batch} x {channels} channels", "ms": 1e3 * medians["block"]},
        {"what": "LN(x), pool and LN(queries) one by one", "ms": 1e3 * medians["separate"]},
        {"what": "the same in one pass, at a copy's speed", "ms": 1e3 * fused},
        {"what": "a block's time that it could save, %", "ms": 100 * (medians["separate"] - fused) / medians["block"]},
    ]


def show(rows: list[Row]) -> None:
    """A Markdown table."""
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        cells = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()]
        print("| " + " | ".join(cells) + " |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    name = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    dtype = getattr(torch, name)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    where = machine(options.device)
    print(", ".join(f"{key} {value}" for key, value in where.items()) + f", {name}\n")
    tables = {
        **{f"bytes, {batch} images": moved_bytes(batch, options.device, dtype, options.rounds) for batch in (32, 256)},
        "planning": planning(options.device, options.rounds),
        "attention": attention(options.device, dtype, options.rounds),
        "fusion": fusion(options.device, dtype, options.rounds),
    }
    for rows in tables.values():
        show(rows)
    if options.output:
        options.output.write_text(json.dumps({"machine": where, "dtype": name, **tables}, indent=1) + "\n")


if __name__ == "__main__":
    main()
