"""``dge-benchmark``: how much faster a DGE model is than the dense one, and how much its MACs promise."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dge_recipes.cli import check_target, run_command
from dge_recipes.errors import UserError

__all__ = ["main"]

_DESCRIPTION = """\
Time a DGE model and timm's dense model of the same shape in alternation on the same images, and put the speed-up
beside the one that the MACs imply. Writes benchmark.md, benchmark.json and benchmark.png.

  dge-benchmark --output results                          DeiT-Ti, batches 1, 8, 64 and 256
  dge-benchmark --output results --batches 1,8 --rounds 5 a quick look
  dge-benchmark --output results --compile --precision bf16
                                                          also compiled by torch.compile; bfloat16
  dge-benchmark --output results --checkpoint dge.pth     with trained weights and their routing

Without --checkpoint the weights are random and the routers are set to half of the MACs on noise. Compare on an
otherwise idle machine.
"""
_PRECISIONS = ("fp32", "bf16", "fp16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = _parser().parse_args(arguments)
    return run_command("dge-benchmark", lambda: _run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "dge-benchmark",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = ("deit_dge_s124_tiny_patch16_256", "deit_tiny_patch16_256")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the three files")
    parser.add_argument(
        "--model", default=names[0], metavar="NAME", help="the DGE model, by timm's name; default: %(default)s"
    )
    parser.add_argument("--dense", default=names[1], metavar="NAME", help="the dense one; default: %(default)s")
    parser.add_argument("--checkpoint", metavar="PATH", help="weights of the DGE model")
    parser.add_argument(
        "--ratio", type=float, metavar="R", help="set the routers to this MAC ratio: above 0, at most 1"
    )
    parser.add_argument(
        "--batches", default="1,8,64,256", metavar="N,N", help="images per forward; default: %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="timed forwards; default: %(default)s")
    parser.add_argument("--precision", choices=_PRECISIONS, default="fp32", help="default: %(default)s")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1 ...")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: PyTorch's choice")
    parser.add_argument("--compile", action="store_true", help="also time both compiled")
    parser.add_argument("--backend", default="inductor", metavar="NAME", help="of --compile; default: %(default)s")
    return parser


def _run(options: argparse.Namespace) -> None:
    batches = _batches(options.batches)
    for name, number in (("rounds", options.rounds), ("threads", options.threads)):
        if number is not None and number < 1:
            raise UserError(f"--{name} {number}: expected at least 1")
    check_target("--output", options.output, folder=True)
    # Imported late: --help answers at once.
    import torch

    from dge_recipes.benchmarking.measuring import measure
    from dge_recipes.benchmarking.report import to_markdown, write_report
    from dge_recipes.benchmarking.subjects import build_pair

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = _device(options.device)
    if options.compile and options.backend not in torch.compiler.list_backends(exclude_tags=()):
        usual = ", ".join(torch.compiler.list_backends())
        raise UserError(f"--backend {options.backend}: torch.compile has none of that name; usual ones are {usual}")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.precision]
    pair = build_pair(options.model, options.dense, options.checkpoint, options.ratio, device)
    backend = options.backend if options.compile else None
    found = measure(pair.models, pair.images, batches, backend=backend, rounds=options.rounds, dtype=dtype)
    facts: dict[str, Any] = {
        "model": options.model,
        "dense": options.dense,
        "routing": pair.routing,
        "mac_ratio": round(pair.mac_ratio, 4),
        "precision": options.precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu_threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "torch": torch.__version__,
    }
    write_report(options.output, found, facts)
    print(to_markdown(found, facts))


def _batches(text: str) -> list[int]:
    try:
        batches = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--batches {text!r}: expected whole numbers with commas between, for example 1,8") from error
    if min(batches) < 1:
        raise UserError(f"--batches {text!r}: expected numbers of at least 1")
    return batches


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise UserError("--device meta: it computes nothing; expected cpu, cuda, cuda:1 ...")
    return device


if __name__ == "__main__":
    sys.exit(main())
