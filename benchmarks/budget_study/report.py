"""A study's table, numbers and pictures."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dge_recipes import markdown
from dge_recipes.checkpoints.atomic_files import write_text
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
        seconds: the run took, evaluations included; what it started from not included. None: not known.
        training_images_per_second: of the median log interval.
        images_per_second: of inference.
    """

    row: str
    seed: int
    acc1: float
    mac_ratio: float
    macs: float
    seconds: float | None = None
    training_images_per_second: float | None = None
    images_per_second: float | None = None


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


# What a row has: heading, format, and the unit that the table shows it in.
_COLUMNS = {
    "acc1": ("Acc@1 (%)", ".2f", 1.0),
    "mac_ratio": ("MACs / dense", ".3f", 1.0),
    "macs": ("mean MACs (M)", ".2f", 1e6),
    "seconds": ("training (s)", ".0f", 1.0),
    "training_images_per_second": ("training images/s", ".0f", 1.0),
    "images_per_second": ("inference images/s", ".0f", 1.0),
}

_TIMED = (
    ("study_speed.png", "images_per_second", "inference images/s"),
    ("study_training.png", "seconds", "seconds of training"),
)


def summarize(findings: Sequence[Finding]) -> dict[str, dict[str, Any]]:
    """Per row: ``acc1``, ``mac_ratio``, ``macs`` and what else all its runs know, as :class:`Mean`; the ``seeds``."""
    rows: dict[str, list[Finding]] = {}
    for finding in findings:
        rows.setdefault(finding.row, []).append(finding)
    return {row: {**_means(found), "seeds": [each.seed for each in found]} for row, found in rows.items()}


def _means(found: Sequence[Finding]) -> dict[str, Mean]:
    columns = {name: [getattr(each, name) for each in found] for name in _COLUMNS}
    return {name: Mean.of(values) for name, values in columns.items() if None not in values}


def to_markdown(findings: Sequence[Finding]) -> str:
    """One line per row; a column that no row knows is left out."""
    rows = summarize(findings)
    columns = {name: column for name, column in _COLUMNS.items() if any(name in found for found in rows.values())}
    heads = ["model", *(head for head, _, _ in columns.values()), "runs"]
    lines = []
    for row, found in rows.items():
        cells = [_cell(found.get(name), spec, unit) for name, (_, spec, unit) in columns.items()]
        lines.append([row.replace("_", " "), *cells, str(len(found["seeds"]))])
    return markdown.table(heads, lines)


def _cell(value: Mean | None, spec: str, unit: float) -> str:
    if value is None:
        return "not measured"
    return f"{Mean(value.mean / unit, None if value.std is None else value.std / unit):{spec}}"


def write_study(output: Path, title: str, findings: Sequence[Finding], machine: dict[str, Any]) -> dict[str, Any]:
    """Write ``study.md``, ``study.json``, ``study.png`` and, where times are known, ``study_{speed,training}.png``.

    Args:
        output: the folder.
        title: what the data are.
        findings: of all runs that are done.
        machine: what they ran on.

    Returns:
        The content of ``study.json``.

    Raises:
        UserError: it cannot be written.
    """
    output.mkdir(parents=True, exist_ok=True)
    means = summarize(findings)
    rows = {
        row: {name: asdict(value) if isinstance(value, Mean) else value for name, value in found.items()}
        for row, found in means.items()
    }
    content = {"rows": rows, "runs": [asdict(finding) for finding in findings], "title": title, "machine": machine}
    write_text(output / "study.json", json.dumps(content, indent=2) + "\n")
    facts = "\n".join(f"- {name}: {value}" for name, value in machine.items())
    write_text(output / "study.md", f"# {title}\n\n{facts}\n\n{to_markdown(findings)}\n")
    _draw(output / "study.png", means, title, "mac_ratio", "MACs / dense")
    for picture, key, label in _TIMED:
        if any(key in found for found in means.values()):
            _draw(output / picture, means, title, key, label)
    return content


def _draw(path: Path, rows: dict[str, dict[str, Any]], title: str, key: str, label: str) -> None:
    """Accuracy over something: a curve per way to train, bars of one standard deviation."""
    families: dict[str, list[tuple[Mean, Mean]]] = {}
    for row, found in rows.items():
        if key in found:
            families.setdefault(" ".join(row.split("_")[:2]), []).append((found[key], found["acc1"]))

    def draw(axes: Any) -> None:
        for name, points in families.items():
            xs, ys = zip(*sorted(points, key=lambda point: point[0].mean), strict=True)
            x, y = ([each.mean for each in means] for means in (xs, ys))
            x_bars, y_bars = ([each.std or 0 for each in means] for means in (xs, ys))
            axes.errorbar(x, y, xerr=x_bars, yerr=y_bars, marker="o", capsize=3, label=name)

    draw_chart(path, draw, title=f"{title}: accuracy against {label}", x=label, y="Acc@1 (%)")
