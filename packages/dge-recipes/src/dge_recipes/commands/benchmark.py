"""``dge-benchmark``: how much faster a DGE model is than the dense one, and how much its MACs promise."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dge_recipes.cli import check_target, comma_list, command_parser, run_command
from dge_recipes.commands.peers import run_peers
from dge_recipes.errors import UserError

if TYPE_CHECKING:
    from dge_recipes.evaluation.target import Target

__all__ = ["main"]

_DESCRIPTION = """\
Time a DGE model and timm's dense model of the same shape in alternation on the same images, and put the speed-up
beside the one that the MACs imply. Writes benchmark.md, benchmark.json and benchmark.png.

  dge-benchmark --output results                          DeiT-Ti, batches 1, 8, 64 and 256
  dge-benchmark --output results --batches 1,8 --rounds 5 a quick look
  dge-benchmark --output results --compile --precision bf16
                                                          also compiled by torch.compile; bfloat16
  dge-benchmark --output results --checkpoint dge.pth     with trained weights and their routing
  dge-benchmark --output results --checkpoint runs/scenes_detection --batches 1,4
                                                          a trained detector or segmenter against its dense twin
  dge-benchmark --output results --peers --model local-dir:dinov2 --images photos/ --batches 1,8,32
                                                          what to make a pretrained model cheaper with

Without --checkpoint the weights are random and the routers are set to half of the MACs on noise. Compare on an
otherwise idle machine.

With --peers a dense model is made cheaper in every way that needs no training: token merging as it was published and
with as many tokens as each image needs, and DGE with fitted routers. Fidelity, speed, and the fidelity at equal speed
go into peers.md, peers.json and peers.png.
"""
_DGE, _DENSE = "deit_dge_s124_tiny_patch16_256", "deit_tiny_patch16_256"
_PRECISIONS = ("fp32", "bf16", "fp16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(given)
    return run_command("dge-benchmark", lambda: _run(options, given), whole=options.traceback)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("dge-benchmark", _DESCRIPTION)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the three files")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help=f"the DGE model, by timm's name; default: {_DGE}. With --peers, a dense one: as dge-compress takes it",
    )
    parser.add_argument("--dense", metavar="NAME", help=f"the dense one; default: {_DENSE}")
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
    parser.add_argument("--peers", action="store_true", help="compare ways to make --model cheaper without training")
    parser.add_argument("--images", type=Path, metavar="DIR", help="of --peers: pictures to compare on")
    parser.add_argument(
        "--calibration", type=Path, metavar="DIR", help="of --peers: others to calibrate on; default: half of --images"
    )
    parser.add_argument("--ratios", default="0.7,0.6", metavar="R,R", help="of --peers; default: %(default)s")
    parser.add_argument("--image-size", type=int, metavar="N", help="of --peers; default: the model's own")
    return parser


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    batches = comma_list("--batches", options.batches, int, "1,8")
    if min(batches) < 1:
        raise UserError(f"--batches {options.batches!r}: expected numbers of at least 1")
    for name, number in (("rounds", options.rounds), ("threads", options.threads)):
        if number is not None and number < 1:
            raise UserError(f"--{name} {number}: expected at least 1")
    if options.peers and options.model is None:
        raise UserError("--peers: expected --model NAME, the model to make cheaper")
    for name in ("images", "calibration", "image_size"):
        if not options.peers and getattr(options, name) is not None:
            raise UserError(f"--{name.replace('_', '-')}: is for --peers alone")
    check_target("--output", options.output, folder=True)
    # Imported late: --help answers at once.
    import torch

    from dge_recipes.benchmark import benchmark_table, build_pair, build_task_pair, measure, write_report
    from dge_recipes.devices import find_device
    from dge_recipes.evaluation.speed import device_facts
    from dge_recipes.models import display_name

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.compile and options.backend not in torch.compiler.list_backends(exclude_tags=()):
        usual = ", ".join(torch.compiler.list_backends())
        raise UserError(f"--backend {options.backend}: torch.compile has none of that name; usual ones are {usual}")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.precision]
    if options.peers:
        run_peers(options, batches, dtype, given)
        return
    device = find_device(options.device)
    target = _task_run(options)
    if target is not None:
        config = target.config
        model = f"{config.head.kind} on {display_name(config.model)}"
        dense = "the same with every query computed"
        pair = build_task_pair(target, device)
    else:
        model, dense = options.model or _DGE, options.dense or _DENSE
        pair = build_pair(model, dense, options.checkpoint, options.ratio, device)
    backend = options.backend if options.compile else None
    found = measure(pair.models, pair.images, batches, backend=backend, rounds=options.rounds, dtype=dtype)
    facts: dict[str, Any] = {
        "model": model,
        "dense": dense,
        "routing": pair.routing,
        "mac_ratio": round(pair.mac_ratio, 4),
        "precision": options.precision,
        **device_facts(device),
        "rounds": options.rounds,
        "torch": torch.__version__,
    }
    write_report(options.output, found, facts)
    print(benchmark_table(found, facts))


def _task_run(options: argparse.Namespace) -> "Target | None":
    """The run that --checkpoint means, where it is of detection or segmentation."""
    from dge_recipes.checkpoints import run_config
    from dge_recipes.config import load_config
    from dge_recipes.evaluation.target import find_target

    recorded = None if options.checkpoint is None else run_config(options.checkpoint)
    if recorded is None or load_config(str(recorded)).task == "classification":
        return None
    for name in ("model", "dense", "ratio"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name}: is not for {options.checkpoint}, a run that knows its model and its twin")
    if options.compile:
        raise UserError(f"--compile: is not for {options.checkpoint}, whose sizes depend on what it finds")
    return find_target(options.checkpoint, None, ())
