"""The study's table, numbers and picture."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dge_recipes.checkpoints.folder import write_text
from dge_recipes.plots import draw_chart

__all__ = ["Finding", "Mean", "summarize", "to_markdown", "write_study"]


@dataclass(frozen=True)
class Finding:
    """One row of one seed.

    Attributes:
        row: its name.
        seed: the run's.
        acc1: held-out accuracy in percent.
        mac_ratio: MACs over the dense model's; 1 for the dense model.
        macs: mean multiply-accumulates per image.
    """

    row: str
    seed: int
    acc1: float
    mac_ratio: float
    macs: float


@dataclass(frozen=True)
class Mean:
    """Mean and sample standard deviation over seeds; the deviation of one run is None."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        """Of at least one value."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}}" + ("" if self.std is None else f" ± {self.std:{spec}}")


def summarize(findings: Sequence[Finding]) -> dict[str, dict[str, Any]]:
    """Per row: ``acc1``, ``mac_ratio`` and ``macs`` as :class:`Mean`, and the ``seeds``."""
    rows: dict[str, list[Finding]] = {}
    for finding in findings:
        rows.setdefault(finding.row, []).append(finding)
    return {
        row: {
            **{name: Mean.of([getattr(each, name) for each in found]) for name in ("acc1", "mac_ratio", "macs")},
            "seeds": [each.seed for each in found],
        }
        for row, found in rows.items()
    }


def to_markdown(findings: Sequence[Finding]) -> str:
    """One line per row."""
    lines = ["| model | Acc@1 (%) | MACs / dense | mean MACs (M) | runs |", "|---|---|---|---|---|"]
    for row, found in summarize(findings).items():
        macs = Mean.of([each.macs / 1e6 for each in findings if each.row == row])
        numbers = f"{found['acc1']:.2f} | {found['mac_ratio']:.3f} | {macs:.2f}"
        lines.append(f"| {row.replace('_', ' ')} | {numbers} | {len(found['seeds'])} |")
    return "\n".join(lines)


def write_study(output: Path, findings: Sequence[Finding]) -> dict[str, Any]:
    """Write ``study.md``, ``study.json`` and ``study.png``.

    Returns:
        The content of ``study.json``.

    Raises:
        UserError: it cannot be written.
    """
    output.mkdir(parents=True, exist_ok=True)
    rows = {
        row: {name: asdict(value) if isinstance(value, Mean) else value for name, value in found.items()}
        for row, found in summarize(findings).items()
    }
    content = {"rows": rows, "runs": [asdict(finding) for finding in findings]}
    write_text(output / "study.json", json.dumps(content, indent=2) + "\n")
    write_text(output / "study.md", to_markdown(findings) + "\n")
    _draw(output / "study.png", summarize(findings))
    return content


def _draw(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Accuracy over MACs: a curve per way to train, bars of one standard deviation."""
    families: dict[str, list[dict[str, Any]]] = {}
    for row, found in rows.items():
        families.setdefault("_".join(row.split("_")[:2]).replace("_", " "), []).append(found)

    def draw(axes: Any) -> None:
        for name, found in families.items():
            points = sorted(found, key=lambda each: each["mac_ratio"].mean)
            columns = [[getattr(each[key], part) or 0 for each in points] for key, part in _COLUMNS]
            x, y, x_bar, y_bar = columns
            axes.errorbar(x, y, xerr=x_bar, yerr=y_bar, marker="o", capsize=3, label=name)

    draw_chart(path, draw, title="Handwritten digits: accuracy against MACs", x="MACs / dense", y="Acc@1 (%)")


_COLUMNS = (("mac_ratio", "mean"), ("acc1", "mean"), ("mac_ratio", "std"), ("acc1", "std"))
