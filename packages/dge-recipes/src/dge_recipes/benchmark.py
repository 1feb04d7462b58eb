"""Speed and memory of a DGE model against the dense model of the same shape, eager and compiled, and the report.

Its command line is ``commands/benchmark.py``.
"""

import sys

from dge_recipes import markdown
from dge_recipes.commands.benchmark import main

if __name__ == "__main__":  # before PyTorch is imported, which reads then what the command line sets
    sys.exit(main())

import json
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

import dge_models
from dge_models import Router
from dge_recipes.checkpoints.atomic_files import write_text
from dge_recipes.checkpoints.stored_classes import stored_classes
from dge_recipes.config import ModelConfig
from dge_recipes.errors import UserError
from dge_recipes.evaluation.speed import time_forwards
from dge_recipes.evaluation.target import Target
from dge_recipes.models import create_model, is_routed, load_weights, routed_part
from dge_recipes.plots import draw_curves
from dge_recipes.tasks import task_of

__all__ = ["Measurement", "Pair", "benchmark_table", "build_pair", "build_task_pair", "main", "measure"]
__all__ += ["speedups", "write_report"]


_COUNTED = 8  # images that say what a trained detector or segmenter spends


@dataclass(frozen=True)
class Pair:
    """A dense model and the DGE model of the same shape, on one device, in evaluation mode.

    Attributes:
        models: ``dense`` and ``DGE``.
        images: makes a batch of the given size, of noise or held-out images, alone in a list.
        mac_ratio: mean MACs of the DGE model over the dense one's, on such images.
        routing: where the routing comes from, for the report.
    """

    models: dict[str, nn.Module]
    images: Callable[[int], list[Any]]
    mac_ratio: float
    routing: str


def build_pair(dge: str, dense: str, checkpoint: str | None, ratio: float | None, device: torch.device) -> Pair:
    """Build both models.

    Args:
        dge: the DGE model's name known to timm.
        dense: the dense model's.
        checkpoint: weights of the DGE model, a head of another size left out; None: random weights, the routers
            set to `ratio`.
        ratio: MAC ratio to set the routers to; None: as the checkpoint has them, or 0.5 without one.
        device: to run on.

    Raises:
        UserError: an unknown model, one without routers, weights that do not fit, a ratio out of reach, or a dense
            model that is no vision transformer or takes other images.
    """
    torch.manual_seed(0)
    routed = create_model(ModelConfig(name=dge), 1000)
    if not is_routed(routed):
        raise UserError(f"--model {dge} has no routers; expected a DGE model, and --dense for the one to compare with")
    routing = f"as {checkpoint} has it"
    if checkpoint is not None:
        load_weights(routed, checkpoint, reset_head=True)
    else:
        ratio = 0.5 if ratio is None else ratio
        for module in routed.modules():
            if isinstance(module, Router):  # as initialised a router can hardly tell regions apart
                nn.init.normal_(module.gate.weight)
    size = timm.get_pretrained_cfg(dge).input_size  # type: ignore[union-attr]
    plain = create_model(ModelConfig(name=dense), 1000)
    models = {"dense": plain.to(device).eval(), "DGE": routed.to(device).eval()}

    def images(batch: int) -> list[Tensor]:
        return [torch.randn(batch, *size, generator=torch.Generator().manual_seed(batch)).to(device)]

    calibration = images(4) + images(5)
    try:
        with torch.inference_mode():
            plain(calibration[0][:1])
        static = dge_models.count_macs(plain, calibration[0]).total.mean().item()
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"--dense {dense} cannot be compared on images of {list(size)}: {error}") from error
    if ratio is not None:
        try:
            setting = dge_models.set_budget(routed, ratio, calibration)
        except ValueError as error:
            raise UserError(f"--ratio {ratio}: {error}") from error
        source = "random" if checkpoint is None else checkpoint
        routing = f"{source} weights, set to a MAC ratio of {setting.ratio:.3f} on noise"
    dynamic = dge_models.count_macs(routed, calibration[0]).total.mean().item()
    return Pair(models, images, dynamic / static, routing)


def build_task_pair(target: Target, device: torch.device) -> Pair:
    """A trained detector or segmenter, and the same with a backbone that computes every query.

    Args:
        target: its recipe, whose held-out images are the batches, and its weights.
        device: to run on.

    Raises:
        UserError: data that are not there, weights that do not fit, a backbone without routers, or more images asked
            for than there are.
    """
    from dge_recipes.dense import forward_counted  # with libraries that the rest does without

    task, config, weights = task_of(target.config), target.config, target.find_weights()
    classes = None if weights is None else stored_classes(weights[0])
    held_out = task.build_held_out(config, classes, f"the weights {target.weights} know")
    model = task.build_model(config, held_out.num_classes, held_out.image_shape, init=False)
    if weights is not None:
        load_weights(model, str(weights[0]), ema=weights[1])
    if not is_routed(routed_part(model)):
        raise UserError(f"--checkpoint {target.weights}: its backbone {config.model.name} has no routers")
    model = model.to(device).eval()
    models = {"dense": dge_models.dense_copy(model), "DGE": model}
    data_set = held_out.loader.dataset

    def images(batch: int) -> list[Any]:
        found = task.first_images(data_set, batch)
        if len(found) < batch:
            raise UserError(f"--batches {batch}: expected at most {len(found)}, held-out images of one shape")
        return [send_to_device(found, device)]

    with torch.inference_mode():
        _, macs = forward_counted(model, send_to_device(task.first_images(data_set, _COUNTED), device))
    beside = macs.neck + macs.head
    ratio = (float(macs.backbone.mean()) + beside) / (macs.static_backbone + beside)
    return Pair(models, images, ratio, f"as {target.weights} has it, on the first held-out images")


@dataclass(frozen=True)
class Measurement:
    """One model, one way to run it, one batch size.

    Attributes:
        model: ``dense`` or ``DGE``.
        variant: ``eager`` or ``compiled``.
        batch: images per forward.
        images_per_second: of the median forward.
        p50_ms, p95_ms: latency of a forward, in milliseconds.
        memory_mib: the most that a forward needed beside weights and images, on CUDA; None elsewhere.
    """

    model: str
    variant: str
    batch: int
    images_per_second: float
    p50_ms: float
    p95_ms: float
    memory_mib: float | None


def measure(
    models: dict[str, nn.Module],
    images: Callable[[int], Sequence[Any]],
    batches: Sequence[int],
    *,
    backend: str | None,
    rounds: int,
    dtype: torch.dtype,
) -> list[Measurement]:
    """Time evaluation forwards; at each batch size all models alternate, so that all meet the same conditions.

    Args:
        models: by name, in evaluation mode on their device.
        images: makes batches [B, C, H, W], or lists of images, of the given size on that device, which are taken in
            turn.
        batches: images per forward.
        backend: also time the models compiled by this backend of torch.compile; None: eager alone.
        rounds: timed forwards of each.
        dtype: float32, or what autocast computes in.
    """
    variants = {(name, "eager"): model for name, model in models.items()}
    if backend is not None:
        for name, model in models.items():
            compiled: Any = torch.compile(model, backend=backend, dynamic=True)
            variants[name, "compiled"] = compiled
    found = []
    for batch in batches:
        data = images(batch)
        runs = {"/".join(key): model for key, model in variants.items()}
        with _precision(data[0], dtype), nullcontext() if backend is None else _compiling():
            memory = {name: _memory(model, data[0]) for name, model in runs.items()}
            seconds = time_forwards(runs, data, rounds)
        for (name, variant), key in zip(variants, runs, strict=True):
            times = seconds[key]
            p50 = statistics.median(times)
            numbers = (batch / p50, 1e3 * p50, 1e3 * float(np.percentile(times, 95)))
            found.append(Measurement(name, variant, batch, *numbers, memory[key]))
    return found


def _precision(images: Sequence[Tensor] | Tensor, dtype: torch.dtype) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is torch.float32 else torch.autocast(images[0].device.type, dtype)


def _compiling() -> AbstractContextManager[Any]:
    """Models of one class share a cache; beyond its limit PyTorch would go on without compiling."""
    return torch._dynamo.config.patch(recompile_limit=1000, fail_on_recompile_limit_hit=True)  # type: ignore[no-any-return, no-untyped-call, unused-ignore]


def _memory(model: nn.Module, images: Sequence[Tensor] | Tensor) -> float | None:
    device = images[0].device
    if device.type != "cuda":
        return None
    with torch.inference_mode():
        model(images)  # compilation and workspaces are not the model's need
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        model(images)
        torch.cuda.synchronize(device)
    return round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)


def speedups(measurements: Sequence[Measurement]) -> dict[tuple[int, str], float]:
    """Median latency of the dense model over the DGE model's, by (batch, variant)."""
    times = {(each.model, each.batch, each.variant): each.p50_ms for each in measurements}
    return {
        (batch, variant): times["dense", batch, variant] / time
        for (model, batch, variant), time in times.items()
        if model == "DGE"
    }


def benchmark_table(measurements: Sequence[Measurement], facts: dict[str, Any]) -> str:
    """Two tables: every measurement, and the speed-ups beside what the MACs imply.

    Args:
        measurements: of both models.
        facts: ``mac_ratio``, and what else was recorded; listed above the tables.
    """
    times = markdown.table(
        ("model", "run", "batch", "images/s", "p50 ms", "p95 ms", "memory MiB"),
        (
            (
                each.model,
                each.variant,
                str(each.batch),
                f"{each.images_per_second:.1f}",
                f"{each.p50_ms:.2f}",
                f"{each.p95_ms:.2f}",
                "not measured" if each.memory_mib is None else f"{each.memory_mib:.0f}",
            )
            for each in measurements
        ),
    )
    implied = 1 / facts["mac_ratio"]
    shares = markdown.table(
        ("run", "batch", "measured speed-up", "implied by MACs", "share reached"),
        (
            (variant, str(batch), f"{measured:.2f}x", f"{implied:.2f}x", f"{measured / implied:.0%}")
            for (batch, variant), measured in speedups(measurements).items()
        ),
    )
    return "\n".join([*(f"- {name}: {value}" for name, value in facts.items()), "", times, "", shares])


def write_report(folder: Path, measurements: Sequence[Measurement], facts: dict[str, Any]) -> None:
    """Write ``benchmark.md``, ``benchmark.json`` and ``benchmark.png`` into a folder.

    Raises:
        UserError: it cannot be written.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for each in measurements:
        curves.setdefault(f"{each.model}, {each.variant}", []).append((each.batch, each.images_per_second))
    title = f"{facts['model']} against {facts['dense']}, {facts['precision']}"
    draw_curves(folder / "benchmark.png", curves, title=title, x="images per forward", y="images/s")
    write_text(folder / "benchmark.md", f"# {title}\n\n{benchmark_table(measurements, facts)}\n")
    content = {**facts, "measurements": [asdict(each) for each in measurements]}
    write_text(folder / "benchmark.json", json.dumps(content, indent=2) + "\n")
