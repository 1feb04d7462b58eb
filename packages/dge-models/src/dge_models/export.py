"""Export of a model of static shapes: written, compared with PyTorch on pictures, and timed."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dge_models.evaluating import evaluating
from dge_models.export_formats import INPUT, OUTPUT, export_format, open_exported, write_exported
from dge_models.timing import time_in_turns

__all__ = ["Agreement", "Exported", "export_model", "time_runs"]

_TOLERANCE = 1e-4
_BATCH_TOLERANCE = 1e-5
_LEAST_COSINE = 0.9  # less is broken, not imprecise
_BATCHES = (1, 2, 7, 16)
_NUDGE, _NUDGES = 1e-6, 8

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Agreement:
    """How an export's outputs compare with PyTorch's, on the same pictures.

    Attributes:
        pictures: How many.
        largest_difference: Of any output of any picture, ties left out.
        tolerance: What it may be at most in fp32; None in other precisions, whose outputs have to be finite and at a
            mean cosine of 0.9.
        cosine: Mean over the pictures.
        agreement: Share of the pictures whose largest output is the same one.
        ties: Pictures left out of `largest_difference`. Regions of theirs score alike but for rounding, and PyTorch's
            own output moves beyond the tolerance when a millionth is added to their pixels.
        batch_difference: The largest difference of a picture's output in batches of 1, 2, 7 and 16; None where the
            batch is fixed.
    """

    pictures: int
    largest_difference: float
    tolerance: float | None
    cosine: float
    agreement: float
    ties: int
    batch_difference: float | None


@dataclass(frozen=True)
class Exported:
    """What :func:`export_model` wrote.

    Attributes:
        path: The artefact.
        input_shape: (N, C, H, W); N is None where the batch is dynamic.
        output_shape: (N, features).
        agreement: With the model in PyTorch.
        seconds: That the export took, without the comparison.
        input_name: What the graph calls its input; a package has none.
        output_name: And its output.
    """

    path: Path
    input_shape: tuple[int | None, ...]
    output_shape: tuple[int | None, ...]
    agreement: Agreement
    seconds: float
    input_name: str = INPUT
    output_name: str = OUTPUT


def export_model(
    model: nn.Module, images: Tensor, folder: Path, *, to: str, batch: int | None = 1, precision: str = "fp32"
) -> Exported:
    """Export a model of static shapes, and compare what was written with the model.

    In fp32 every output has to be within 1e-4 of PyTorch's, times the largest output where that exceeds 1, but for
    pictures that tie (see :class:`Agreement`), and with a dynamic batch a picture's outputs in several batches within
    1e-5 of each other, scaled likewise. In other precisions outputs have to be finite and at a mean cosine of 0.9 or
    more to PyTorch's; how close they are is reported. What fails leaves nothing behind.

    Args:
        model: On the CPU; with routed blocks or merging tokens, after :func:`fix_shapes`. Its modes are kept.
        images: float32 [P, C, H, W], normalised pictures to compare on.
        folder: Is there; the files go into it.
        to: "onnx", "openvino" or "pt2".
        batch: Images that the export takes at once; None: 1 to 1024.
        precision: "fp32"; "int8" for ONNX, "fp16" for OpenVINO, "bf16" for pt2.

    Returns:
        Where it is, and how its outputs compare.

    Raises:
        ImportError: A package or a C++ compiler that the target needs is not installed.
        RuntimeError: The model cannot be exported.
        ValueError: An unknown target or precision, no pictures, a batch below 1, or outputs that differ.
    """
    chosen = export_format(to, precision, dynamic_batch=batch is None)
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images: got shape {tuple(images.shape)}; expected [P, C, H, W], at least one picture")
    if batch is not None and batch < 1:
        raise ValueError(f"batch: got {batch}; expected at least 1, or None for a dynamic one")
    with evaluating(model), tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as name:
        aside = Path(name) / chosen.file
        begin = time.perf_counter()
        example = _repeated(images, 2 if batch is None else batch)
        write_exported(model, example, aside, to=to, precision=precision, dynamic_batch=batch is None)
        seconds = time.perf_counter() - begin
        run = open_exported(aside)
        agreement = _compare(model, run, images, batch, precision)
        features = tuple(run(example).shape[1:])
        del run
        for file in sorted(aside.parent.iterdir()):
            file.replace(folder / file.name)
    return Exported(folder / chosen.file, (batch, *images.shape[1:]), (batch, *features), agreement, seconds)


def time_runs(
    runs: Mapping[str, Run], images: Tensor, rounds: int = 20, *, threads: int | None = None
) -> dict[str, float]:
    """Median seconds of each, called in turns, so that whatever else the machine does meets all of them alike.

    Args:
        runs: By name.
        images: The batch that each is called with.
        rounds: Timed calls of each, after two that are not.
        threads: That PyTorch may use meanwhile; None: as many as it does. ONNX Runtime and OpenVINO have their own,
            see :func:`open_exported`.
    """
    with _threads(threads):
        seconds = time_in_turns(runs, [images], rounds)
    return {name: statistics.median(each) for name, each in seconds.items()}


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _repeated(images: Tensor, count: int) -> Tensor:
    """So many images, again from the first one where there are fewer."""
    return images[torch.arange(count) % len(images)].contiguous()


def _in_batches(run: Run, images: Tensor, batch: int) -> Tensor:
    """Outputs [P, features], in batches of this size alone: the last one is filled up."""
    starts = range(0, len(images), batch)
    return torch.cat([run(_repeated(images[start : start + batch], batch)) for start in starts])[: len(images)]


def _compare(model: nn.Module, run: Run, images: Tensor, batch: int | None, precision: str) -> Agreement:
    """The agreement; a ValueError if it is not enough."""
    with torch.no_grad():
        expected: Tensor = torch.cat([model(part) for part in images.split(16)]).float()
    got = _in_batches(run, images, batch or 8)
    if not got.isfinite().all():
        raise ValueError("model: its export gives outputs that are not finite")
    scale = max(1.0, float(expected.abs().max()))
    cosine = float(F.cosine_similarity(got, expected, dim=-1).mean())
    same = float((got.argmax(1) == expected.argmax(1)).double().mean())
    exact = precision == "fp32"
    tolerance = _TOLERANCE * scale if exact else None
    difference = (got - expected).abs().flatten(1).amax(1)
    largest, ties = _largest(difference, model, images, tolerance)
    if tolerance is not None and largest > tolerance:
        raise ValueError(
            f"model: an output of its export differs from PyTorch's by {largest:.2g} on the pictures given; expected "
            f"at most {tolerance:.2g}"
        )
    if not exact and cosine < _LEAST_COSINE:
        raise ValueError(
            f"model: outputs of its export in {precision} have a mean cosine of {cosine:.3f} to PyTorch's on the "
            f"pictures given; expected at least {_LEAST_COSINE}"
        )
    spread = None
    if batch is None:
        spread = _batch_difference(model, run, images[:16], _BATCH_TOLERANCE * scale if exact else None)
    return Agreement(len(images), largest, tolerance, cosine, same, ties, spread)


def _largest(difference: Tensor, model: nn.Module, images: Tensor, tolerance: float | None) -> tuple[float, int]:
    """The largest of the pictures' differences, those left out that tie, and how many these are."""
    kept = torch.ones(len(images), dtype=torch.bool)
    if tolerance is not None:
        for index in (difference > tolerance).nonzero().flatten().tolist():
            kept[index] = not _is_tie(model, images[index : index + 1], tolerance)
    if not kept.any():
        raise ValueError(
            f"images: the regions of all {len(images)} pictures score alike but for rounding, so that nothing can be "
            "compared; expected pictures with different regions, or a model whose routers tell them apart"
        )
    return float(difference[kept].max()), int((~kept).sum())


def _is_tie(model: nn.Module, image: Tensor, tolerance: float) -> bool:
    """Whether PyTorch's own output moves beyond the tolerance when nearly nothing is added to the pixels."""
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        expected = model(image)
        for _ in range(_NUDGES):
            moved = model(image + _NUDGE * torch.randn(image.shape, generator=noise))
            if float((moved - expected).abs().max()) > tolerance:
                return True
    return False


def _batch_difference(model: nn.Module, run: Run, images: Tensor, tolerance: float | None) -> float:
    """Of the same pictures in batches of several sizes; a ValueError if it is above the tolerance."""
    outputs = torch.stack([_in_batches(run, images, size) for size in _BATCHES])
    found, _ = _largest((outputs.amax(0) - outputs.amin(0)).flatten(1).amax(1), model, images, tolerance)
    if tolerance is not None and found > tolerance:
        raise ValueError(
            f"model: outputs of its export for one picture differ by {found:.2g} between batches of {_BATCHES}; "
            f"expected at most {tolerance:.2g}"
        )
    return found
