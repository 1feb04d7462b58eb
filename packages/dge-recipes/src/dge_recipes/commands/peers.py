"""``dge-benchmark --peers``: ways to make one pretrained model cheaper, side by side."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dge_recipes.cli import comma_list
from dge_recipes.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["run_peers"]

_LIMIT = 256  # pictures of each kind
_SHARE = 0.5  # of one folder that is compared on


def run_peers(options: argparse.Namespace, batches: Sequence[int], dtype: Any, given: Sequence[str]) -> None:
    """Compare the methods on one model and pictures.

    Args:
        options: of the command line.
        batches: images per forward.
        dtype: to compute in.
        given: the command line, for the report.

    Raises:
        UserError: an option that is missing or cannot be meant, or no method gives a model.
    """
    _check(options)
    ratios = comma_list("--ratios", options.ratios, float, "0.7,0.6")
    if not all(0 < ratio < 1 for ratio in ratios):
        raise UserError(f"--ratios {options.ratios}: expected MAC ratios above 0 and below 1")

    from dge_recipes.compress.fidelity import reads_class_token
    from dge_recipes.compress.report import machine
    from dge_recipes.compress.source import load_dense
    from dge_recipes.devices import find_device
    from dge_recipes.peers import compare_peers, make_peers, write_peers

    device = find_device(options.device)
    dense = load_dense(options.model, options.image_size)
    calibration, fitted_on, pictures = (
        [batch.to(device) for batch in batches] for batches in _pictures(options, dense.view)
    )
    model = dense.model.to(device)
    peers, models, reasons = make_peers(model, ratios, calibration, pictures, _tell, fitted_on=fitted_on)
    _tell("timing")
    backend = options.backend if options.compile else None
    found = compare_peers(model, models, pictures, batches, backend=backend, rounds=options.rounds, dtype=dtype)
    facts = {
        "model": dense.name,
        "command": shlex.join(["dge-benchmark", *given]),
        "image_size": dense.view["image_size"],
        "class_cosine_of": "class token" if reads_class_token(model) else "pooled features",
        "calibration_pictures": sum(map(len, calibration)),
        "routers_fitted_on": sum(map(len, fitted_on)),
        "pictures": sum(map(len, pictures)),
        "precision": options.precision,
        "rounds": options.rounds,
        **machine(device),
    }
    print(write_peers(options.output, peers, found, reasons, facts))


def _check(options: argparse.Namespace) -> None:
    if options.images is None:
        raise UserError("--peers: expected --images DIR, pictures to compare on")
    for name in ("dense", "checkpoint", "ratio"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name}: is not for --peers, which makes every model from --model (ratios: --ratios)")
    if options.image_size is not None and options.image_size < 1:
        raise UserError(f"--image-size {options.image_size}: expected at least 1")


def _pictures(options: argparse.Namespace, view: dict[str, Any]) -> "tuple[list[Tensor], ...]":
    """Batches to calibrate on; the same, with crops where they are few, to fit routers on; and others to compare on."""
    from dge_recipes.compress.crops import FITTED_ON, read_crops, with_crops
    from dge_recipes.compress.pictures import Pictures, pictures_section, read_pictures

    def read(folder: Path) -> Pictures:
        return read_pictures(pictures_section(folder, view, [f"data.held_out={_SHARE}"]), 8, _LIMIT)

    found = read(options.images)
    known, calibration, pictures = found, found.calibration, found.held_out
    if options.calibration is not None:
        known = read(options.calibration)
        calibration, pictures = [*known.calibration, *known.held_out], [*found.calibration, *found.held_out]
    fitted_on = calibration
    if sum(map(len, calibration)) < FITTED_ON:
        fitted_on = with_crops(calibration, read_crops(known.train, known.section, 0), FITTED_ON)
    return calibration, fitted_on, pictures


def _tell(line: str) -> None:
    print(f"dge-benchmark: {line} ...", file=sys.stderr, flush=True)
