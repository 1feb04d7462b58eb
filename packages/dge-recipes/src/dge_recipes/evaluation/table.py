"""Rows like those of the method's published table, in Markdown."""

from collections.abc import Iterable
from dataclasses import dataclass

from dge_recipes.evaluation.published import Published

__all__ = ["Row", "markdown_table"]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        model: its name.
        acc1, acc5: accuracy in percent.
        macs: mean multiply-accumulates per image.
        images_per_second: measured throughput, None where it was not measured.
        published: the authors' numbers for the same model, None where there are none.
    """

    model: str
    acc1: float
    acc5: float
    macs: float
    images_per_second: float | None
    published: Published | None = None


def markdown_table(rows: Iterable[Row]) -> str:
    """The table, with its head; a published row follows the measured one."""
    lines = ["| model | Acc@1 | Acc@5 | mean MACs | images/s |", "|---|---|---|---|---|"]
    for row in rows:
        numbers = f"{row.acc1:.2f} | {row.acc5:.2f} | {_macs(row.macs)} | {_speed(row.images_per_second)}"
        lines.append(f"| {row.model} | {numbers} |")
        if row.published is not None:
            known = row.published
            lines.append(f"| published | {known.acc1:.1f} | {known.acc5:.1f} | {known.macs / 1e9:.1f} G | |")
    return "\n".join(lines)


def _macs(macs: float) -> str:
    unit, name = (1e9, "G") if macs >= 1e9 else (1e6, "M")
    return f"{macs / unit:.2f} {name}"


def _speed(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.0f}"
