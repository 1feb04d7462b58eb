"""Images per second of every registered model, eager, at one batch size; routing forced to a MAC ratio.

python benchmarks/throughput.py [--device cpu|cuda] [--dtype float32|bfloat16] [--threads N] [--batch 8] [--ratio 0.57]
                                [--rounds 5] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import timm
import torch
from speed import force_routing, forward, images_for, set_ratio, show
from timing import in_turns, machine

from dge_models import RoutedModel, dge_deit, dge_dpvt, dge_pvt
from dge_models.routed import routed_blocks


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row: the model's MAC ratio on the images of the batch, and its images per second."""
    torch.manual_seed(0)
    model = timm.create_model(name).to(options.device).eval()
    images = images_for(options.batch, options)
    ratio = 1.0
    if isinstance(model, RoutedModel):
        for block in routed_blocks(model):
            force_routing(block.router)
        ratio = set_ratio(model, images, options.ratio)
    with torch.inference_mode():
        seconds = in_turns({name: forward(model, images, options)}, options.device, options.rounds)[name]
    return {"model": name, "batch": options.batch, "MAC ratio": ratio, "images/s": options.batch / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--ratio", type=float, default=0.57, help="MAC ratio to force")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = machine(options.device)
    print(", ".join(f"{key} {value}" for key, value in where.items()) + f", {options.dtype}\n")
    names = (*dge_deit.default_cfgs, *dge_pvt.default_cfgs, *dge_dpvt.default_cfgs)
    rows = [measure(name, options) for name in names]
    show("Throughput", rows)
    if options.output:
        options.output.write_text(
            json.dumps({"machine": where, "dtype": options.dtype, "models": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
