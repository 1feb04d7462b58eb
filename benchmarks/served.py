"""``python -m benchmarks.served``: routed models of fixed shapes in other runtimes, beside the dense ones."""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import dge_models
from benchmarks.provenance import provenance
from benchmarks.served_profile import compare_profiles, print_profiles, profile
from dge_recipes import markdown
from dge_recipes.cli import command_parser, run_command
from dge_recipes.compress.report import machine
from dge_recipes.errors import UserError

__all__ = ["main"]

_DESCRIPTION = """\
Export DGE models of fixed shapes and the dense models behind them in the same way, compare outputs with PyTorch, and
time both in alternation on one thread. Weights are random, and routers tell regions apart.

  python -m benchmarks.served --output FILE.json
  python -m benchmarks.served --models deit_small_patch16_224@256 --to onnx --ratios 0.6 --batches 1    one of them
  python -m benchmarks.served --profile --ratios 0.6 --batches 1 --output FILE.json    where the time goes, by operator
"""
_MODELS = ("deit_small_patch16_224@256", "vit_small_patch14_dinov2@224")
_COMPARED = 4  # pictures
_COLUMNS = ("model", "runtime", "MAC ratio", "batch", "against dense", "implied", "share", "difference to PyTorch")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = _parser().parse_args(arguments)
    options.told = list(sys.argv[1:] if arguments is None else arguments)
    return run_command("benchmarks.served", lambda: _run(options), whole=options.traceback)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.served", _DESCRIPTION)
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON")
    parser.add_argument(
        "--models", nargs="+", default=list(_MODELS), metavar="NAME@SIZE", help="timm's; size in pixels"
    )
    parser.add_argument("--to", nargs="+", choices=("onnx", "openvino"), default=["onnx", "openvino"], metavar="NAME")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.6, 0.9], metavar="R")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], metavar="N")
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="timed forwards; default: %(default)s")
    parser.add_argument("--profile", action="store_true", help="milliseconds by kind of operator, in place of speeds")
    return parser


def _run(options: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    facts = {
        **provenance("benchmarks.served", options.told),
        "threads": 1,
        "rounds": options.rounds,
        **machine(torch.device("cpu")),
    }
    if not options.profile:
        print("\n".join(markdown.head(_COLUMNS)))
    for name, size in map(_named, options.models):
        dense, routed = _pair(name, size)
        images = torch.randn(_COMPARED, 3, size, size, generator=torch.Generator().manual_seed(1))
        for to in options.to:
            with tempfile.TemporaryDirectory(prefix="dge-served-") as folder:
                for row in _rows(dense, routed, images, to, options, Path(folder)):
                    rows.append({"model": name, "image_size": size, "to": to, **row})
                    _tell(rows[-1])
            if options.output is not None:  # who ends it keeps what was measured
                versions = {
                    each: version(each)
                    for each in ("onnx", "onnxscript", *_runtimes(sorted({row["to"] for row in rows})))
                }
                content = {**facts, **versions, "rows": rows}
                options.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _runtimes(names: Sequence[str]) -> list[str]:
    return ["onnxruntime" if name == "onnx" else name for name in names]


def _named(text: str) -> tuple[str, int]:
    name, _, size = text.partition("@")
    if not size.isdigit() or int(size) < 1:
        raise UserError(f"--models {text}: expected NAME@SIZE, such as {_MODELS[0]}")
    return name, int(size)


def _pair(name: str, size: int) -> tuple[nn.Module, nn.Module]:
    """A dense model, and the routed one with the same weights."""
    torch.manual_seed(0)
    try:
        dense = timm.create_model(name, img_size=size).eval()
        routed = dge_models.from_timm(dense)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"--models {name}@{size}: {error}") from error
    for module in routed.modules():
        if isinstance(module, dge_models.Router):  # as initialised a router can hardly tell regions apart
            nn.init.normal_(module.gate.weight)
    return dense, routed.eval()


def _rows(
    dense: nn.Module, routed: nn.Module, images: Tensor, to: str, options: argparse.Namespace, folder: Path
) -> list[dict[str, Any]]:
    """One row per ratio and batch."""
    rows = []
    _export(dense, images, to, folder / "dense")
    for ratio in options.ratios:
        fixed = dge_models.set_fixed_queries(routed, ratio)
        exported = _export(routed, images, to, folder / f"{ratio:g}")
        paths = {"dense": folder / "dense" / exported.path.name, "DGE": exported.path}
        for batch in options.batches:
            pixels = images[torch.arange(batch) % len(images)].contiguous()
            found = (_profiled if options.profile else _timed)(paths, pixels, options.rounds, fixed.ratio)
            rows.append(
                {
                    "ratio": fixed.ratio,
                    "batch": batch,
                    **found,
                    "largest_difference": exported.agreement.largest_difference,
                    "batch_difference": exported.agreement.batch_difference,
                    "export_seconds": exported.seconds,
                }
            )
    return rows


def _timed(paths: dict[str, Path], pixels: Tensor, rounds: int, ratio: float) -> dict[str, Any]:
    runs = {name: dge_models.open_exported(path, threads=1) for name, path in paths.items()}
    seconds = dge_models.time_runs(runs, pixels, rounds, threads=1)
    speedup = seconds["dense"] / seconds["DGE"]
    return {"seconds": seconds, "against_dense": speedup, "share_of_implied": speedup * ratio}


def _profiled(paths: dict[str, Path], pixels: Tensor, rounds: int, _: float) -> dict[str, Any]:
    profiles = {name: profile(path, pixels, rounds) for name, path in paths.items()}
    return {"operators": compare_profiles(profiles)}


def _export(model: nn.Module, images: Tensor, to: str, folder: Path) -> dge_models.Exported:
    """With a dynamic batch."""
    folder.mkdir()
    try:
        return dge_models.export_model(model, images, folder, to=to, batch=None)
    except (ImportError, ValueError) as error:
        raise UserError(f"--to {to}: {error}") from error


def _tell(row: dict[str, Any]) -> None:
    model = f"{row['model']} at {row['image_size']}"
    if "operators" in row:
        print_profiles(row["operators"], f"{model}, {row['to']}, MAC ratio {row['ratio']:.3f}, batch {row['batch']}")
        return
    speed = f"{row['against_dense']:.2f}x", f"{1 / row['ratio']:.2f}x", f"{row['share_of_implied']:.2f}"
    what = model, row["to"], f"{row['ratio']:.3f}", str(row["batch"])
    print(markdown.line((*what, *speed, f"{row['largest_difference']:.1e}")), flush=True)


if __name__ == "__main__":
    sys.exit(main())
