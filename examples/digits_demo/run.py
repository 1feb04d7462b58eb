"""The demonstration, from nothing to ``summary.json`` and ``granularity.png``."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dge_recipes.checkpoints.atomic_files import write_text
from dge_recipes.config import Config, load_config
from dge_recipes.data import HeldOutData, build_held_out
from dge_recipes.errors import UserError
from dge_recipes.evaluation import Row, markdown_table
from dge_recipes.models import build_model, is_routed, load_weights
from dge_recipes.train import train
from examples.digits_demo.comparison import Comparison, compare_speed
from examples.digits_demo.granularity import draw_digits, fine_shares

__all__ = ["run_demo"]

_HOW = "converted from the dense model with dge_models.from_timm, then fine-tuned"
_BATCH = 64


def run_demo(output: Path, *, seed: int = 0, overwrite: bool = False, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train both models, compare them, draw, and write the summary.

    Args:
        output: the demo's folder.
        seed: of everything random.
        overwrite: replace what an earlier demo left there.
        overrides: ``section.key=value`` for both recipes.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        UserError: the folder is in use or cannot be written, or an override is wrong.
    """
    start = time.perf_counter()
    _claim(output, overwrite)
    common = [*overrides, f"train.seed={seed}", "eval.timing_rounds=0"]
    dense_config = load_config("digits_dense", [*common, f"output.dir={output / 'dense'}"])
    dge_config = load_config(
        "digits_converted", [*common, f"model.init_from={output / 'dense'}", f"output.dir={output / 'dge'}"]
    )
    print(f"1/4 training the dense model ({dense_config.model.name})")
    dense = train(dense_config, overwrite=overwrite)
    print(f"2/4 training the DGE model: {_HOW}")
    dge = train(dge_config, overwrite=overwrite)
    held_out = build_held_out(dge_config)
    dense_model, dge_model = _trained(dense_config, held_out), _trained(dge_config, held_out)
    if not is_routed(dge_model):
        raise UserError("the demo compares a dense model with a converted one: leave model.convert as it is")
    print(f"3/4 timing both at batch {_BATCH} in alternating runs")
    speed = compare_speed(dense_model, dge_model, held_out.loader.dataset, _BATCH)
    print("4/4 drawing where the DGE model spends its queries")
    shares = fine_shares(dge_model, held_out.loader.dataset)
    draw_digits(dge_model, held_out.loader.dataset, output / "granularity.png")
    summary = _summary(dense, dge, speed, shares)
    summary["seconds"] = round(time.perf_counter() - start, 1)
    write_text(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    _tell(summary, output)
    return summary


def _claim(output: Path, overwrite: bool) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("the demo is for one process: start it with python, without a launcher")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise UserError(f"output folder {output} is not empty: choose another (--output DIR) or add --overwrite")
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name in ("summary.json", "granularity.png"):
            (output / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"output folder {output} cannot be written: {error}") from error


def _trained(config: Config, held_out: HeldOutData) -> nn.Module:
    model = build_model(config.model, held_out.num_classes, held_out.image_shape, init=False)
    load_weights(model, config.output.dir)
    return model.eval()


def _summary(dense: dict[str, Any], dge: dict[str, Any], speed: Comparison, shares: dict[str, float]) -> dict[str, Any]:
    keep = ("acc1", "acc5", "macs", "parameters", "epochs", "seconds")
    ratio = dge["macs"] / dense["macs"]
    return {
        "dense": {**{key: dense[key] for key in keep}, "images_per_second": speed.dense},
        "dge": {
            **{key: dge[key] for key in keep},
            "images_per_second": speed.dge,
            "mac_ratio": ratio,
            "speedup": speed.speedup,
            "implied_speedup": 1 / ratio,
            "trained": _HOW,
            "fine_share": shares,
        },
        "held_out_images": dge["images"],
        "timing": {"batch_size": _BATCH, "rounds": speed.rounds, "statistic": "median of alternating runs"},
        **{
            key: dge[key]
            for key in ("seed", "num_processes", "device", "cpu_threads", "cpu_capability", "torch", "timm")
        },
    }


def _tell(summary: dict[str, Any], output: Path) -> None:
    dense, dge = summary["dense"], summary["dge"]
    rows = [
        Row(name, each["acc1"], each["acc5"], each["macs"], each["images_per_second"])
        for name, each in (("dense", dense), ("DGE", dge))
    ]
    shares = dge["fine_share"]
    print(f"\n{markdown_table(rows)}\n")
    print(f"DGE model: {_HOW}")
    print(
        f"MAC ratio {dge['mac_ratio']:.3f} implies {dge['implied_speedup']:.2f}x; measured {dge['speedup']:.2f}x "
        f"({dge['speedup'] / dge['implied_speedup']:.0%} of it), batch {_BATCH}, {summary['cpu_threads']} CPU threads"
    )
    print(f"regions at the finest split: {shares['ink']:.0%} of those with ink, {shares['ground']:.0%} of plain ground")
    print(f"{output / 'granularity.png'}, {output / 'summary.json'}; {summary['seconds']:.0f} s in all")
