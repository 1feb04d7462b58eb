"""Ways to make one pretrained model cheaper, side by side: at equal MACs, and at equal time by the clock.

Its command line is ``dge-benchmark --peers``, in ``commands/benchmark.py``.
"""

import copy
import json
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import dge_models
from dge_recipes import markdown
from dge_recipes.benchmark import Measurement, measure
from dge_recipes.checkpoints.atomic_files import write_text
from dge_recipes.compress.fidelity import Fidelity, measure_fidelity
from dge_recipes.errors import UserError
from dge_recipes.plots import draw_curves

__all__ = ["PEERS", "Peer", "RoutedCopies", "compare_peers", "make_peers", "peers_table"]
__all__ += ["published_merging", "write_peers"]

_NEAR = 0.02  # to the ratio that was asked for


@dataclass(frozen=True)
class Peer:
    """One method at one ratio.

    Attributes:
        method: one of ``PEERS``.
        asked: the MAC ratio that it was to reach on the calibration pictures.
        fidelity: what it keeps of the dense model, and its MAC ratio, on the other pictures.
        seconds: that making it took; the first that has some routers counts their fit.
    """

    method: str
    asked: float
    fidelity: Fidelity
    seconds: float

    @property
    def name(self) -> str:
        """Of the method at this ratio."""
        return _name(self.method, self.asked)


def _name(method: str, asked: float) -> str:
    return f"{method} {asked:g}"


def published_merging(dense: nn.Module, ratio: float, images: Tensor) -> nn.Module:
    """Token merging as it was published: as many merges in every layer and every image.

    After Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023.

    Args:
        dense: the model, which :func:`dge_models.merge_tokens` takes.
        ratio: MAC ratio; the nearest that whole numbers of merges give is taken.
        images: [B, 3, H, W], a picture whose MACs are counted.

    Raises:
        ValueError: no number of merges comes near `ratio`.
    """
    merged: Any = dge_models.merge_tokens(dense, 1.0, adaptive=False)

    def ratio_at(each: int) -> float:
        left, counts = merged.patch_embed.num_patches, []
        for _ in merged.blocks:
            counts.append(min(each, left // 2))
            left -= counts[-1]
        dge_models.set_merge_counts(merged, counts)
        count = dge_models.count_macs(merged, images[:1])
        return float(count.total[0]) / count.static_total

    most = merged.patch_embed.num_patches // 2
    # The more merge, the lower the ratio. The nearest is the first one below, or the last one above.
    first = bisect_left(range(1, most), -ratio, key=lambda each: -ratio_at(each)) + 1
    best = min(range(max(first - 1, 1), first + 1), key=lambda each: abs(ratio_at(each) - ratio))
    reached = ratio_at(best)
    if abs(reached - ratio) > _NEAR:
        raise ValueError(f"ratio: got {ratio}; the nearest that as many merges in every layer give is {reached:.3f}")
    return cast(nn.Module, merged)


class RoutedCopies:
    """Routed copies of a model at any ratio: routers are fitted once, since only the budget depends on the ratio.

    Args:
        dense: the model.
        splits: of routed regions, finest first.
        fitted_on: batches [B, 3, H, W] that routers are fitted on, when the first copy is asked for.

    Attributes:
        seconds: that the fit took; 0 before it.
    """

    def __init__(self, dense: nn.Module, splits: tuple[int, ...], fitted_on: Sequence[Tensor]) -> None:
        self._dense, self._splits, self._fitted_on = dense, splits, fitted_on
        self._fitted: nn.Module | None = None
        self.seconds = 0.0

    def at(self, ratio: float, calibration: Sequence[Tensor]) -> nn.Module:
        """A copy whose budget is set on `calibration`; a ValueError if the ratio is out of reach."""
        if self._fitted is None:
            start = time.perf_counter()
            fitted = dge_models.from_timm(self._dense, self._splits)
            dge_models.fit_routers(fitted, self._fitted_on, 1.0, calibration=calibration[:1])
            self._fitted, self.seconds = fitted, time.perf_counter() - start
        routed = copy.deepcopy(self._fitted)
        dge_models.set_budget(routed, ratio, calibration)
        return routed


PEERS = ("merge, published", "merge, ragged", "DGE (2,1), fitted", "DGE (4,2,1), fitted")
"""Names of the ways to make a cheaper copy, as tables have them."""


def _makers(
    dense: nn.Module, calibration: Sequence[Tensor], fitted_on: Sequence[Tensor]
) -> dict[str, Callable[[float], nn.Module]]:
    """By name: what makes a copy at a ratio."""
    routers = [RoutedCopies(dense, splits, fitted_on) for splits in ((2, 1), (4, 2, 1))]
    ways: list[Callable[[float], nn.Module]] = [
        lambda ratio: published_merging(dense, ratio, calibration[0]),
        lambda ratio: dge_models.merge_tokens(dense, ratio, calibration),
        *(lambda ratio, each=each: each.at(ratio, calibration) for each in routers),
    ]
    return dict(zip(PEERS, ways, strict=True))


def make_peers(
    dense: nn.Module,
    ratios: Sequence[float],
    calibration: Sequence[Tensor],
    pictures: Sequence[Tensor],
    tell: Callable[[str], None] = lambda _: None,
    *,
    fitted_on: Sequence[Tensor] | None = None,
) -> tuple[list[Peer], dict[str, nn.Module], dict[str, str]]:
    """Make every method's copies, and compare them with the dense model.

    Args:
        dense: in evaluation mode, on its device.
        ratios: MAC ratios to ask every method for.
        calibration: batches [B, 3, H, W] on that device.
        pictures: the same, of others.
        tell: called with a line whenever something begins.
        fitted_on: that routers are fitted on, the same pictures and crops of them; None: `calibration` alone.

    Returns:
        The peers, their models by name, and by name why there is no model.
    """
    models: dict[str, nn.Module] = {}
    reasons: dict[str, str] = {}
    made: list[tuple[str, float, float]] = []
    makers = _makers(dense, calibration, calibration if fitted_on is None else fitted_on)
    for ratio in ratios:
        for method, make in makers.items():
            name = _name(method, ratio)
            tell(f"making {name}")
            start = time.perf_counter()
            try:
                models[name] = make(ratio).eval()
            except ValueError as error:
                reasons[name] = " ".join(str(error).split())
                continue
            made.append((method, ratio, time.perf_counter() - start))
    tell("comparing with the dense model")
    device = next(dense.parameters()).device
    found = measure_fidelity(dense, models, pictures, device)
    peers = [Peer(method, asked, found[_name(method, asked)], seconds) for method, asked, seconds in made]
    return peers, models, reasons


def compare_peers(
    dense: nn.Module,
    models: Mapping[str, nn.Module],
    pictures: Sequence[Tensor],
    batches: Sequence[int],
    *,
    backend: str | None,
    rounds: int,
    dtype: torch.dtype,
) -> list[Measurement]:
    """Time the dense model and its copies on real pictures, as :func:`~dge_recipes.benchmark.measure` does.

    Args:
        dense: in evaluation mode.
        models: by name, likewise.
        pictures: batches [B, 3, H, W] on their device. They are taken in turn, again and again for large batches, so
            that the cost of a model that spends more on some pictures is its mean.
        batches, backend, rounds, dtype: as there.
    """
    stock = torch.cat(list(pictures))

    def images(batch: int) -> list[Tensor]:
        return [stock[(turn * batch + torch.arange(batch)) % len(stock)] for turn in range(rounds)]

    return measure({"dense": dense, **models}, images, batches, backend=backend, rounds=rounds, dtype=dtype)


def _speeds(measurements: Sequence[Measurement]) -> dict[tuple[str, str, int], float]:
    """Times as fast as the dense model, by (model, variant, batch)."""
    times = {(each.model, each.variant, each.batch): each.p50_ms for each in measurements}
    return {key: times["dense", key[1], key[2]] / value for key, value in times.items()}


def _at_speed(points: Sequence[tuple[float, float]], speed: float) -> float | None:
    """The error at a speed, by log-linear interpolation between measured points (speed, error)."""
    known = dict(points)
    if speed in known:
        return known[speed]
    for (slow, less), (fast, more) in pairwise(sorted(points)):
        if slow <= speed <= fast:
            share = (speed - slow) / (fast - slow)
            smallest = 1e-12  # a copy may be the dense model itself
            return math.exp((1 - share) * math.log(max(less, smallest)) + share * math.log(max(more, smallest)))
    return None


def peers_table(peers: Sequence[Peer], measurements: Sequence[Measurement], reasons: Mapping[str, str]) -> str:
    """Two tables in Markdown: at equal MACs, and what the class cosine is where all are as fast.

    Args:
        peers: what they keep.
        measurements: how fast they are, the dense model among them.
        reasons: why some gave no model.
    """
    speeds = _speeds(measurements)
    runs = list(dict.fromkeys((each.variant, each.batch) for each in measurements))
    columns = [f"batch {batch}, {variant}" for variant, batch in runs]
    kept = markdown.table(
        ("method", "MAC ratio", "class cosine", "token cosine", "implied", *columns),
        (
            (
                peer.method,
                f"{peer.fidelity.mac_ratio:.3f}",
                f"{peer.fidelity.class_cosine:.4f}",
                f"{peer.fidelity.token_cosine:.4f}",
                f"{1 / peer.fidelity.mac_ratio:.2f}x",
                *(f"{speeds[peer.name, variant, batch]:.2f}x" for variant, batch in runs),
            )
            for peer in peers
        ),
    )
    missing = [f"\n{name}: no model: {reason}" for name, reason in reasons.items()]
    return "\n".join([kept, *missing, "", _equal_time(peers, speeds, runs)])


def _equal_time(
    peers: Sequence[Peer], speeds: Mapping[tuple[str, str, int], float], runs: Sequence[tuple[str, int]]
) -> str:
    """The second table: at the speeds of the published method, the class cosine of each."""
    methods = list(dict.fromkeys(peer.method for peer in peers))
    what = "Class cosine at equal time: at the speed that the first method reaches, between each one's measured ratios."
    rows: list[tuple[str, ...]] = []
    for variant, batch in runs:
        points = {
            method: [
                (speeds[peer.name, variant, batch], 1 - peer.fidelity.class_cosine)
                for peer in peers
                if peer.method == method
            ]
            for method in methods
        }
        for speed, _ in sorted(points[methods[0]]) if methods else []:
            errors = [_at_speed(points[method], speed) for method in methods]
            cells = ("out of reach" if error is None else f"{1 - error:.4f}" for error in errors)
            rows.append((f"batch {batch}, {variant}", f"{speed:.2f}x", *cells))
    return f"{what}\n\n{markdown.table(('run', 'speed', *methods), rows)}"


def write_peers(
    folder: Path,
    peers: Sequence[Peer],
    measurements: Sequence[Measurement],
    reasons: Mapping[str, str],
    facts: Mapping[str, Any],
) -> str:
    """Write ``peers.md``, ``peers.json`` and ``peers.png`` into a folder.

    Returns:
        The tables.

    Raises:
        UserError: it cannot be written.
    """
    if not peers:
        raise UserError("no method gave a model: " + "; ".join(f"{name}: {why}" for name, why in reasons.items()))
    table = peers_table(peers, measurements, reasons)
    speeds = _speeds(measurements)
    curves: dict[str, list[tuple[float, float]]] = {}
    last = measurements[-1]
    for peer in peers:
        point = (speeds[peer.name, last.variant, last.batch], 1 - peer.fidelity.class_cosine)
        curves.setdefault(peer.method, []).append(point)
    title = f"{facts['model']}: error by speed, batch {last.batch}, {last.variant}"
    x, y = "times as fast as the dense model", "1 - cosine of the class token"
    draw_curves(folder / "peers.png", curves, title=title, x=x, y=y)
    told = [f"- {name}: {value}" for name, value in facts.items()]
    write_text(folder / "peers.md", "\n".join([f"# {facts['model']}, made cheaper", "", *told, "", table]) + "\n")
    content = {
        **facts,
        "peers": [asdict(peer) for peer in peers],
        "no_model": dict(reasons),
        "measurements": [asdict(each) for each in measurements],
    }
    write_text(folder / "peers.json", json.dumps(content, indent=2) + "\n")
    return table
