"""``dge-export``: a model as an artefact for ONNX Runtime, OpenVINO or a server without Python."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dge_recipes.cli import check_target, command_parser, run_command
from dge_recipes.errors import UserError

__all__ = ["main"]

_DESCRIPTION = """\
Export a model for a runtime, compare what was written with PyTorch on your pictures, and time it.

  dge-export cheaper --to onnx --images photos/ --output served
                                                          what dge-compress made, or a folder of save_pretrained
  dge-export cheaper --to onnx --batch dynamic --ratio 0.7 --images photos/ --output served
                                                          any number of pictures at once, another budget
  dge-export runs/my_run --to openvino --batch 8 --images photos/ --output served
                                                          a model of dge-train, eight pictures at once
  dge-export deit_small_patch16_224.fb_in1k --to pt2 --ratio 1 --images photos/ --output served
                                                          a dense model of timm, for a server without Python
  python served/classify.py photos/                       needs onnxruntime (or openvino, or torch), numpy and pillow

All shapes are fixed: every image costs what the pictures cost on average. The output folder holds the artefact,
model.json (how pictures are prepared, classes, counts, how close it is to PyTorch, timings) and classify.py.
"""
_TARGETS, _PRECISIONS = ("onnx", "pt2", "openvino"), ("fp32", "fp16", "bf16", "int8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_intermixed_args(given)
    return run_command("dge-export", lambda: _run(options, given), whole=options.traceback)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("dge-export", _DESCRIPTION)
    parser.add_argument(
        "model", metavar="MODEL", help="the folder of a saved model or a run, a model name of timm, or hf-hub:NAME"
    )
    parser.add_argument("--to", choices=_TARGETS, required=True, help="what will run it")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="pictures, in folders or not")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--ratio", type=float, metavar="R", help="mean MACs, as a share of the dense model's; default: the model's own"
    )
    parser.add_argument(
        "--batch", default="1", metavar="N", help="pictures at once, or dynamic (not for pt2); default: %(default)s"
    )
    parser.add_argument(
        "--precision",
        choices=_PRECISIONS,
        default="fp32",
        help="int8 for onnx, fp16 (weights) for openvino, bf16 for pt2; default: %(default)s",
    )
    parser.add_argument("--image-size", type=int, metavar="N", help="side of the pictures; default: the model's own")
    parser.add_argument(
        "--limit", type=int, default=256, metavar="N", help="pictures to calibrate on; default: %(default)s"
    )
    parser.add_argument(
        "--rounds", type=int, default=20, metavar="N", help="timed forwards, 0 for none; default: %(default)s"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="data.key=value", help="keys of dge-train's pictures to change"
    )
    return parser


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    batch = _check(options)
    # Imported late: --help answers at once.
    from dge_recipes.compress.pictures import pictures_section, read_pictures
    from dge_recipes.compress.source import load_source
    from dge_recipes.export.engine import Wishes, check_wishes, export
    from dge_recipes.new_folder import check_new_folder

    wishes = Wishes(options.to, options.ratio, batch, options.precision, options.rounds)
    check_new_folder(options.output)
    check_wishes(wishes)
    pictures_section(options.images, {}, options.overrides)  # a mistake is told before anything is loaded
    _tell(f"loading {options.model}")
    source = load_source(options.model, options.image_size)
    _tell(f"reading pictures in {options.images}")
    section = pictures_section(options.images, source.view, options.overrides)
    pictures = read_pictures(section, 8, options.limit)
    facts = export(source, pictures, wishes, options.output, shlex.join(["dge-export", *given]), _tell)
    print("\n".join(_lines(facts, options.output)))


def _lines(facts: dict[str, Any], output: Path) -> list[str]:
    """What was found, for people."""
    close = facts["against_pytorch"]
    allowed = "" if close["tolerance"] is None else f", {close['tolerance']:.2g} allowed"
    lines = [
        f"MAC ratio {facts['ratio']:.3f} of every image",
        f"against PyTorch, {close['pictures']} pictures: largest difference {close['largest_difference']:.2g}{allowed}"
        f"; mean cosine {close['cosine']:.6f}; same largest {close['agreement']:.1%}",
    ]
    if close["ties"]:
        lines.append(f"of {close['ties']} more pictures regions score alike but for rounding: not compared")
    if close["batch_difference"] is not None:
        lines.append(f"batches of 1 to 16: largest difference {close['batch_difference']:.2g}")
    kept = facts["against_dense"]
    if kept is not None:
        lines.append(f"against the dense model: cosine {kept['cosine']:.4f}, same largest {kept['agreement']:.1%}")
    for row in facts["timings"]:
        line = f"batch {row['batch']}, 1 thread: {1000 * row['seconds']['exported']:.1f} ms"
        if "dense" in row["seconds"]:
            line += (
                f", dense {1000 * row['seconds']['dense']:.1f} ms: {row['against_dense']:.2f}x "
                f"(MACs say {row['implied']:.2f}x)"
            )
        lines.append(line)
    return [*lines, f"{output}: python {output}/classify.py PICTURES"]


def _check(options: argparse.Namespace) -> int | None:
    """The batch, None if it is dynamic; a UserError for what can't be meant."""
    if options.ratio is not None and not 0 < options.ratio <= 1:
        raise UserError(f"--ratio {options.ratio:g}: expected a MAC ratio above 0 and at most 1")
    for name, least in (("image_size", 1), ("limit", 1), ("rounds", 0)):
        number = getattr(options, name)
        if number is not None and number < least:
            raise UserError(f"--{name.replace('_', '-')} {number}: expected at least {least}")
    check_target("--output", options.output, folder=True)
    if options.batch == "dynamic":
        return None
    try:
        batch = int(options.batch)
    except ValueError as error:
        raise UserError(f"--batch {options.batch}: expected a number of pictures, or dynamic") from error
    if batch < 1:
        raise UserError(f"--batch {batch}: expected at least 1")
    return batch


def _tell(line: str) -> None:
    print(f"dge-export: {line} ...", file=sys.stderr, flush=True)
