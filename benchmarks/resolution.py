"""``python -m benchmarks.resolution``: what images of more pixels cost, dense and with DGE."""

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance
from dge_recipes import markdown
from dge_recipes.cli import command_parser, run_command
from dge_recipes.errors import UserError

__all__ = ["growth", "main"]

_DESCRIPTION = """\
Time a forward pass in evaluation of a DGE model at a MAC ratio and of the dense model with the same weights, eager on a
CPU, from small images to large ones, and measure how much memory each takes beside the model. Weights are random, and
routers tell regions apart; the budget is set anew for every size. Runs alternate, medians are compared, and every size
has processes of its own. Growth is the exponent p of cost = pixels^p, over all sizes and over the last two.

  python -m benchmarks.resolution --output FILE.json
  python -m benchmarks.resolution --models pvt_dge_s124_tiny_256 --sizes 256 512 --rounds 3    a part of it
"""
_MODELS = ("pvt_dge_s124_tiny_256", "vit_small_patch16_224")
_SIZES = (256, 384, 512, 768, 1024)
_KINDS = ("dense", "DGE")
_COLUMNS = ("model", "pixels", "MAC ratio", "dense ms", "DGE ms", "against dense", "dense MB", "DGE MB", "of dense")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = _parser().parse_args(arguments)
    options.told = list(sys.argv[1:] if arguments is None else arguments)
    return run_command("benchmarks.resolution", lambda: _run(options), whole=options.traceback)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.resolution", _DESCRIPTION)
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON")
    parser.add_argument("--models", nargs="+", default=list(_MODELS), metavar="NAME", help="timm's, routed or plain")
    parser.add_argument("--sizes", nargs="+", type=int, default=list(_SIZES), metavar="PIXELS", help="sides of images")
    parser.add_argument("--ratio", type=float, default=0.5, metavar="R", help="of MACs; default: %(default)s")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images at once; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=11, metavar="N", help="timed forwards; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: %(default)s")
    # What a process of its own measures; for this file alone.
    parser.add_argument("--measure", choices=("seconds", *_KINDS), help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    return parser


def _run(options: argparse.Namespace) -> None:
    for name in ("batch", "rounds", "threads"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: expected at least 1")
    if options.measure is not None:
        measured = _seconds(options) if options.measure == "seconds" else _memory(options)
        print(json.dumps(measured))
        return
    if min(options.sizes) < 1 or len(set(options.sizes)) < len(options.sizes):
        raise UserError(f"--sizes {shlex.join(map(str, options.sizes))}: expected positive numbers, each once")
    options.provenance = provenance("benchmarks.resolution", options.told)
    rows: list[dict[str, Any]] = []
    print("\n".join(markdown.head(_COLUMNS)))
    for name in options.models:
        own: list[dict[str, Any]] = []
        for size in sorted(options.sizes):
            own.append(_row(name, size, options))
            print(_line(own[-1]), flush=True)
            if options.output is not None:  # who ends it keeps what was measured
                _write(options, rows + own)
        rows += own
    for name in options.models:
        print("\n".join(_growth_lines(name, [row for row in rows if row["model"] == name])))


def _row(name: str, size: int, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="dge-resolution-") as folder:
        weights = Path(folder) / "weights.pt"
        timed = _in_own_process(name, size, "seconds", weights, options)
        memory = {kind: _in_own_process(name, size, kind, weights, options)["peak_bytes"] for kind in _KINDS}
    speedup = timed["seconds"]["dense"] / timed["seconds"]["DGE"]
    return {"model": name, "image_size": size, **timed, "against_dense": speedup, "peak_bytes": memory}


def _in_own_process(name: str, size: int, measure: str, weights: Path, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.resolution", "--measure", measure, "--weights", str(weights)]
    command += ["--models", name, "--sizes", str(size)]
    for option in ("ratio", "batch", "rounds", "threads"):
        command += [f"--{option}", str(getattr(options, option))]
    # Of a fixed threshold, so that what a forward pass frees goes back to the system at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"} if measure in _KINDS else None
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise UserError(f"--models {name} at {size} pixels: {said[-1] if said else f'ended with {done.returncode}'}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _pair(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The dense model, the routed one with the same weights, and images."""
    import timm
    import torch
    from torch import nn
    from torch.nn import functional as F

    import dge_models

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    (name,), (size,) = options.models, options.sizes
    try:
        model = timm.create_model(name, img_size=size, num_classes=0).eval()
        held = any(isinstance(module, dge_models.DGEBlock) for module in model.modules())
        routed = model if held else dge_models.from_timm(model)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"--models {name}: {error}") from error
    for module in routed.modules():
        if isinstance(module, dge_models.Router):  # as initialised a router can hardly tell regions apart
            nn.init.normal_(module.gate.weight)
    generator = torch.Generator().manual_seed(1)
    # Things are larger in larger images.
    smooth = F.interpolate(torch.randn(options.batch, 3, 8, 8, generator=generator), size, mode="bilinear")
    images = smooth + 0.3 * torch.randn(options.batch, 3, size, size, generator=generator)
    return dge_models.dense_copy(routed).eval(), routed.eval(), images


def _seconds(options: argparse.Namespace) -> dict[str, Any]:
    """The budget is set, and both models are timed; the weights are left for others to measure."""
    import torch

    import dge_models
    from dge_recipes.compress.report import machine
    from dge_recipes.evaluation.speed import time_forwards

    dense, routed, images = _pair(options)
    try:
        setting = dge_models.set_budget(routed, options.ratio, [images], tolerance=0.02)
    except ValueError as error:
        raise UserError(f"--ratio {options.ratio}: {error}") from error
    torch.save(routed.state_dict(), options.weights)
    times = time_forwards({"dense": dense, "DGE": routed}, [images], options.rounds)
    macs = dge_models.count_macs(routed, images)
    return {
        "ratio": setting.ratio,
        "macs": {"dense": macs.static_total, "DGE": float(macs.total.mean())},
        "seconds": {kind: statistics.median(times[kind]) / options.batch for kind in _KINDS},
        "machine": machine(torch.device("cpu")),
    }


def _memory(options: argparse.Namespace) -> dict[str, Any]:
    """What one forward pass of one model takes at most, beside what was there before it."""
    import torch

    dense, routed, images = _pair(options)
    routed.load_state_dict(torch.load(options.weights, weights_only=True))
    model = dense if options.measure == "dense" else routed
    with torch.inference_mode():
        model(images)  # what libraries load and keep is not the model's
        before = _restarted_peak()
        model(images)
    return {"peak_bytes": _status("VmHWM") - before}


def _restarted_peak() -> int:
    """Let the kernel forget this process's peak; what it has resident now, in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError as error:
        raise UserError(f"memory is measured on Linux alone: {error}") from error
    return _status("VmRSS")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def growth(sizes: Sequence[int], costs: Sequence[float]) -> float:
    """The exponent p of cost = c · pixels^p that fits best, by least squares of the logarithms.

    Args:
        sizes: Sides of square images, two at least.
        costs: Positive, one per size.
    """
    pixels, logs = [2 * math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    return statistics.linear_regression(pixels, logs).slope


def _costs(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """What grows, by what it is and by model."""
    kinds = ("macs", "seconds", "peak_bytes")
    return {what: {kind: [float(row[what][kind]) for row in rows] for kind in _KINDS} for what in kinds}


def _growth(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    sizes = [row["image_size"] for row in rows]
    return {
        what: {
            kind: {"all": growth(sizes, costs), "last": growth(sizes[-2:], costs[-2:])}
            for kind, costs in by_kind.items()
            if min(costs) > 0
        }
        for what, by_kind in _costs(rows).items()
    }


def _growth_lines(name: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    if len(rows) < 2:
        return []
    lines = []
    for what, by_kind in _growth(rows).items():
        told = (f"{kind} {each['all']:.2f} ({each['last']:.2f})" for kind, each in by_kind.items())
        lines.append(f"{name}, growth of {what.replace('_bytes', ' memory')}: {', '.join(told)}")
    return lines


def _write(options: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    from datetime import date

    by_model = {name: [row for row in rows if row["model"] == name] for name in options.models}
    content = {
        **options.provenance,
        "date": date.today().isoformat(),
        "threads": options.threads,
        "rounds": options.rounds,
        "batch": options.batch,
        **rows[0]["machine"],
        "growth": {name: _growth(own) for name, own in by_model.items() if len(own) > 1},
        "rows": [{key: value for key, value in row.items() if key != "machine"} for row in rows],
    }
    options.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _line(row: dict[str, Any]) -> str:
    seconds, memory = row["seconds"], row["peak_bytes"]
    return markdown.line(
        (
            row["model"],
            f"{row['image_size']} × {row['image_size']}",
            f"{row['ratio']:.3f}",
            f"{1e3 * seconds['dense']:.1f}",
            f"{1e3 * seconds['DGE']:.1f}",
            f"{row['against_dense']:.2f}x",
            f"{memory['dense'] / 1e6:.1f}",
            f"{memory['DGE'] / 1e6:.1f}",
            f"{memory['DGE'] / max(memory['dense'], 1):.2f}",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
