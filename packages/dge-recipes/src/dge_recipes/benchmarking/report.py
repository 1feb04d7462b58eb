"""A benchmark as Markdown, as JSON and as a picture."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dge_recipes.benchmarking.measuring import Measurement
from dge_recipes.checkpoints.folder import write_text
from dge_recipes.plots import draw_curves

__all__ = ["speedups", "to_markdown", "write_report"]


def speedups(measurements: Sequence[Measurement]) -> dict[tuple[int, str], float]:
    """Median latency of the dense model over the DGE model's, by (batch, variant)."""
    times = {(each.model, each.batch, each.variant): each.p50_ms for each in measurements}
    return {
        (batch, variant): times["dense", batch, variant] / time
        for (model, batch, variant), time in times.items()
        if model == "DGE"
    }


def to_markdown(measurements: Sequence[Measurement], facts: dict[str, Any]) -> str:
    """Two tables: every measurement, and the speed-ups beside what the MACs imply.

    Args:
        measurements: of both models.
        facts: ``mac_ratio``, and what else was recorded; listed above the tables.
    """
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", "| model | run | batch | images/s | p50 ms | p95 ms | memory MiB |", "|---|---|---|---|---|---|---|"]
    for each in measurements:
        memory = "not measured" if each.memory_mib is None else f"{each.memory_mib:.0f}"
        numbers = f"{each.images_per_second:.1f} | {each.p50_ms:.2f} | {each.p95_ms:.2f} | {memory}"
        lines.append(f"| {each.model} | {each.variant} | {each.batch} | {numbers} |")
    implied = 1 / facts["mac_ratio"]
    lines += ["", "| run | batch | measured speed-up | implied by MACs | share reached |", "|---|---|---|---|---|"]
    for (batch, variant), measured in speedups(measurements).items():
        share = f"{measured / implied:.0%}"
        lines.append(f"| {variant} | {batch} | {measured:.2f}x | {implied:.2f}x | {share} |")
    return "\n".join(lines)


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
    write_text(folder / "benchmark.md", f"# {title}\n\n{to_markdown(measurements, facts)}\n")
    content = {**facts, "measurements": [each.as_dict() for each in measurements]}
    write_text(folder / "benchmark.json", json.dumps(content, indent=2) + "\n")
