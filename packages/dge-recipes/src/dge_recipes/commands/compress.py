"""``dge-compress``: a pretrained vision transformer made cheaper on a folder of pictures, without labels."""

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from dge_recipes.cli import check_target, comma_list, command_parser, run_command
from dge_recipes.errors import UserError

__all__ = ["main"]

_DESCRIPTION = """\
Make a pretrained vision transformer cheaper on your pictures: no labels, minutes on a CPU.

  dge-compress vit_small_patch14_dinov2.lvd142m --images photos/ --ratio 0.6 --image-size 224 --output cheaper
                                                          a model of timm and its weights
  dge-compress local-dir:my_model --images photos/ --ratio 0.6 --output cheaper
                                                          a folder of save_pretrained; hf-hub:NAME likewise
  dge-compress runs/my_run --images photos/ --ratio 0.7 --method merge --output cheaper
                                                          a dense model of dge-train, by one method
  dge-compress local-dir:my_model --images photos/ --ratio 0.7 --method distill --minutes 30 --output cheaper
                                                          with time to learn from the dense model
  dge-compress local-dir:my_model --images photos/ --ratio 0.6 --output cheaper data.unreadable=skip data.exif=true
                                                          pictures that cannot be read are left out, others turned

A tenth of the pictures is held out; what the table says was measured on those. The output folder holds report.json,
granularity.png and the model: timm.create_model("local-dir:cheaper", pretrained=True), once dge_models is imported.
"""
_METHODS = ("auto", "merge", "route", "distill")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_intermixed_args(given)
    return run_command("dge-compress", lambda: _run(options, given), whole=options.traceback)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("dge-compress", _DESCRIPTION)
    parser.add_argument(
        "model", metavar="MODEL", help="a model name of timm, hf-hub:NAME, or the folder of a saved model or a run"
    )
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="pictures, in folders or not")
    parser.add_argument("--ratio", type=float, required=True, metavar="R", help="MACs to reach, as a share of now's")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--method",
        choices=_METHODS,
        default="auto",
        help="merge: similar tokens become one; route: regions get fewer queries; distill: route, then learn from the "
        "dense model; default: auto, the best of those that fit the time",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="that it may take: distillation takes what is left, 30 where it is asked for; auto distils only if given",
    )
    parser.add_argument(
        "--all-weights",
        action=argparse.BooleanOptionalAction,
        help="distill: train all weights, not norms, biases and scales alone; default: from 128 pictures on",
    )
    parser.add_argument(
        "--splits", default="2,1", metavar="N,N", help="route: queries per region side; default: %(default)s"
    )
    parser.add_argument("--image-size", type=int, metavar="N", help="side of the pictures; default: the model's own")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--limit", type=int, default=256, metavar="N", help="pictures to calibrate and measure on; default: %(default)s"
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1 ...")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="data.key=value", help="keys of dge-train's pictures to change"
    )
    return parser


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    splits = _check(options)
    # Imported late: --help answers at once.
    from dge_recipes.compress.engine import compress
    from dge_recipes.compress.output import write_output
    from dge_recipes.compress.pictures import pictures_section, read_pictures
    from dge_recipes.compress.source import load_dense
    from dge_recipes.compress.wishes import Wishes
    from dge_recipes.devices import find_device
    from dge_recipes.new_folder import check_new_folder

    check_new_folder(options.output)
    device = find_device(options.device)
    pictures_section(options.images, {}, options.overrides)  # a mistake is told before anything is loaded
    _tell(f"loading {options.model}")
    dense = load_dense(options.model, options.image_size)
    _tell(f"reading pictures in {options.images}")
    section = pictures_section(options.images, dense.view, options.overrides)
    pictures = read_pictures(section, options.batch_size, options.limit)
    wishes = Wishes(
        ratio=options.ratio,
        method=options.method,
        splits=splits,
        minutes=options.minutes,
        all_weights=options.all_weights,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    found = compress(dense, pictures, wishes, device, _tell)
    report = {"command": shlex.join(["dge-compress", *given]), **found.facts}
    result = found.result
    write_output(options.output, found.model, dense.name, result.fidelity.mac_ratio, found.draw(pictures), report)
    print(f"{found.table}\n\n{found.choice.method}: {found.choice.why}")
    print(f'{options.output}: timm.create_model("local-dir:{options.output}", pretrained=True)')


def _check(options: argparse.Namespace) -> tuple[int, ...]:
    """The splits; a UserError for numbers that can't be meant."""
    if not 0 < options.ratio < 1:
        raise UserError(f"--ratio {options.ratio:g}: expected a MAC ratio above 0 and below 1")
    if options.minutes is not None and not 0 < options.minutes < math.inf:
        raise UserError(f"--minutes {options.minutes:g}: expected a number above 0")
    for name in ("image_size", "batch_size", "limit"):
        number = getattr(options, name)
        if number is not None and number < 1:
            raise UserError(f"--{name.replace('_', '-')} {number}: expected at least 1")
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: expected at least 0")
    splits = comma_list("--splits", options.splits, int, "2,1")
    falls = all(fine > coarse > 0 for fine, coarse in pairwise(splits))
    if len(splits) < 2 or not falls or any(splits[0] % split for split in splits):
        rule = "expected two or more numbers that fall and divide the first, such as 4,2,1"
        raise UserError(f"--splits {options.splits}: {rule}")
    check_target("--output", options.output, folder=True)
    return tuple(splits)


def _tell(line: str) -> None:
    print(f"dge-compress: {line} ...", file=sys.stderr, flush=True)
