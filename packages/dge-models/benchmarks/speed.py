"""DGE-DeiT against timm's DeiT: latency, training step, memory; what the MACs imply beside what the clock says.

    python benchmarks/speed.py [--device cpu|cuda] [--threads N] [--sizes tiny small] [--batches 1 8 32]
                               [--train-batch 64] [--rounds 15] [--clock wall|thread] [--no-compile]
                               [--output FILE.json]

Both models see the same images in turns, eager against eager and compiled against compiled; the ratio of the
medians is what counts. Routing is forced: each image of a batch gets random splits of its own, and the share of
regions at the finest split is chosen so that the whole model's MAC ratio is about --ratio. On a CPU in float32, on a
GPU in bfloat16 unless --dtype says otherwise. Memory is measured in a process of its own per row. On a machine that
others use too, `--threads 1 --clock thread` counts the time that inference itself got of a processor.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from timing import in_turns, machine, peak_megabytes
from torch import Tensor
from torch.nn import functional as F

import dge_models
from dge_models.vit import routed_blocks

Row = dict[str, Any]
IMAGE = 256
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "thread": time.thread_time}
NOT_MEASURED = "not measured"


def build(size: str, options: argparse.Namespace) -> tuple[Any, Any]:
    """timm's dense model and the routed one, with the same weights."""
    torch.manual_seed(0)
    dense = timm.create_model(f"deit_{size}_patch16_224", img_size=IMAGE)
    routed = dge_models.from_timm(dense)
    for block in routed_blocks(routed):
        force_routing(block.router)
    return dense.to(options.device).eval(), routed.to(options.device).eval()


def force_routing(router: Any) -> None:
    """Make the choice depend on the tokens, so that it varies from image to image and region to region."""
    with torch.no_grad():
        router.gate.weight.normal_(std=2.0)
        router.gate.bias.copy_(torch.tensor([0.0, 0.0, 0.0]))


def images_for(batch: int, options: argparse.Namespace) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(batch, 3, 8, 8, generator=generator)
    smooth = F.interpolate(coarse, IMAGE, mode="bilinear")
    return (smooth + 0.3 * torch.randn(batch, 3, IMAGE, IMAGE, generator=generator)).to(options.device)


def set_ratio(routed: Any, images: Tensor, ratio: float) -> float:
    """Shift the routing to a MAC ratio on these images; the ratio reached."""
    return dge_models.set_budget(routed, ratio, [images], tolerance=0.02).ratio


def autocast(options: argparse.Namespace) -> Any:
    if options.dtype == "float32":
        return nullcontext()
    return torch.autocast(options.device, dtype=getattr(torch, options.dtype))


def inference(options: argparse.Namespace, mode: str) -> list[Row]:
    """Latency of whole batches, and the speed-up beside what the MAC ratio implies."""
    rows: list[Row] = []
    for size in options.sizes:
        dense, routed = build(size, options)
        for batch in options.batches:
            images = images_for(batch, options)
            ratio = set_ratio(routed, images, options.ratio)
            run: dict[str, Callable[[], object]] = {}
            for name, model in (("dense", dense), ("dge", routed)):
                run[name] = forward(prepare(model, mode), images, options)
            with torch.inference_mode():
                seconds = in_turns(run, options.device, options.rounds, CLOCKS[options.clock])
            speedup = seconds["dense"] / seconds["dge"]
            rows.append(
                {
                    "model": f"DeiT-{size}",
                    "batch": batch,
                    "mode": mode,
                    "MAC ratio": ratio,
                    "dense ms": 1e3 * seconds["dense"],
                    "DGE ms": 1e3 * seconds["dge"],
                    "DGE images/s": batch / seconds["dge"],
                    "speed-up": speedup,
                    "implied": 1 / ratio,
                    "share of implied": speedup * ratio,
                }
            )
            torch.compiler.reset()
    return rows


def prepare(model: Any, mode: str) -> Any:
    """The model itself, or compiled: the dense one for the sizes it sees, the routed one for any number of queries."""
    if mode == "eager":
        return model
    return torch.compile(model, fullgraph=True, dynamic=True if routed_blocks(model) else None)


def forward(model: Any, images: Tensor, options: argparse.Namespace) -> Callable[[], object]:
    def call() -> object:
        with autocast(options):
            return model(images)

    return call


def training_step(model: Any, images: Tensor, options: argparse.Namespace) -> Callable[[], object]:
    """Forward, loss (with the budget's term for a routed model), backward, optimiser."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)  # moves nothing, so the routing stays as it is
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    term = dge_models.BudgetLoss(0.5) if routed_blocks(model) else None

    def call() -> object:
        with autocast(options):
            if term is None:
                logits, penalty = model(images), 0.0
            else:
                logits, routings = model.forward_routed(images)
                penalty = term(model, routings)
            loss = F.cross_entropy(logits.float(), labels) + penalty
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return call


def build_for_training(size: str, kind: str, options: argparse.Namespace) -> tuple[Any, float]:
    dense, routed = build(size, options)
    if kind == "dense":
        return dense.train(), 1.0
    ratio = set_ratio(routed, images_for(options.train_batch, options), options.ratio)
    dge_models.set_training_mode(routed, "sparse" if kind == "DGE sparse" else "dense")
    return routed.train(), ratio


def training(options: argparse.Namespace) -> list[Row]:
    """Step time of the two training modes against the dense model, without noise so that the routing holds."""
    rows: list[Row] = []
    for size in options.sizes:
        images = images_for(options.train_batch, options)
        models = {kind: build_for_training(size, kind, options) for kind in ("dense", "DGE sparse", "DGE dense")}
        steps = {kind: training_step(model, images, options) for kind, (model, _) in models.items()}
        with dge_models.deterministic_routing():
            seconds = in_turns(steps, options.device, max(options.rounds // 3, 3))
        for kind, (_, ratio) in models.items():
            rows.append(
                {
                    "model": f"DeiT-{size}",
                    "batch": options.train_batch,
                    "step": kind,
                    "MAC ratio": ratio,
                    "ms": 1e3 * seconds[kind],
                    "of dense": seconds[kind] / seconds["dense"],
                    "peak MB": in_own_process(_peak_of_step, size, kind, options),
                }
            )
        del models, steps
        gc.collect()
    return rows


def in_own_process(function: Callable[..., float], *arguments: Any) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _peak_of_step(size: str, kind: str, options: argparse.Namespace) -> float:
    """Megabytes at the peak of two training steps: of tensors on a GPU, of the whole process on a CPU."""
    torch.set_num_threads(options.threads)
    model, _ = build_for_training(size, kind, options)
    step = training_step(model, images_for(options.train_batch, options), options)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with dge_models.deterministic_routing():
        step()
        step()
    return peak_megabytes(options.device)


def show(title: str, rows: list[Row]) -> None:
    """A Markdown table."""
    print(f"{title}\n")
    if not rows:
        print(f"{NOT_MEASURED}\n")
        return
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    print()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--sizes", nargs="+", choices=["tiny", "small", "base"], default=["tiny", "small"])
    parser.add_argument("--batches", nargs="+", type=int, help="default: 1 8 32, on a GPU 1 64 256")
    parser.add_argument("--train-batch", type=int, default=64, help="0 leaves the training steps out")
    parser.add_argument("--ratio", type=float, default=0.57, help="MAC ratio to force")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="of inference; thread: on one CPU thread only")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled models out")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    if options.clock == "thread" and (options.device != "cpu" or options.threads != 1):
        parser.error("--clock thread: expected --device cpu --threads 1, it sees no other thread and no GPU")
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    options.batches = options.batches or ([1, 64, 256] if options.device == "cuda" else [1, 8, 32])
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    where = machine(options.device)
    print(", ".join(f"{key} {value}" for key, value in where.items()) + f", {options.dtype}\n")
    tables: dict[str, list[Row]] = {}
    for mode in ("eager", "compiled"):
        tables[mode] = [] if mode == "compiled" and options.no_compile else inference(options, mode)
        show(f"Inference, {mode} against {mode}", tables[mode])
    tables["training"] = training(options) if options.train_batch else []
    show("Training step, eager", tables["training"])
    if options.output:
        shown = {name: rows or NOT_MEASURED for name, rows in tables.items()}
        header = {"machine": where, "dtype": options.dtype, "command": shlex.join(["python", *sys.argv])}
        if options.clock != "wall":
            header["clock of inference"] = options.clock
        options.output.write_text(json.dumps({**header, **shown}, indent=1) + "\n")


if __name__ == "__main__":
    main()
