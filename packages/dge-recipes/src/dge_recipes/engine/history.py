"""How a run's evaluations went, epoch by epoch, as a picture."""

import json
from collections.abc import Sequence
from pathlib import Path

from dge_recipes.engine.run_folder import CURVE_FILE, METRICS_FILE
from dge_recipes.plots import draw_curves

__all__ = ["draw_history"]

_KINDS = {"eval": "", "ema": " (average)"}


def draw_history(folder: Path, names: Sequence[str]) -> None:
    """Draw numbers of a run's evaluations over its epochs into ``curve.png``; those that are null are left out.

    Args:
        folder: of the run.
        names: of the numbers, as ``metrics.jsonl`` has them.

    Raises:
        UserError: the picture cannot be written.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] not in _KINDS:
            continue
        for name in names:
            if record.get(name) is not None:
                label = name.replace("_", " ") + _KINDS[record["kind"]]
                curves.setdefault(label, []).append((record["epoch"], record[name]))
    if curves:
        draw_curves(folder / CURVE_FILE, curves, title="Held-out pictures", x="epoch", y="value")
