"""Results of the methods side by side, and which of them to take."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dge_recipes.compress.fidelity import Fidelity

__all__ = ["Choice", "Result", "choose"]

_SHARE = 0.5


@dataclass(frozen=True)
class Result:
    """One method.

    Attributes:
        method: its name; ``dense`` for the model itself.
        fidelity: on the held-out pictures.
        images_per_second: measured, in alternation with the others.
        against_dense: that, over the dense model's.
        implied: what the MACs say that it could be, on the pictures that were timed.
        seconds: that the method took.
    """

    method: str
    fidelity: Fidelity
    images_per_second: float
    against_dense: float
    implied: float
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "method": self.method,
            **self.fidelity.as_dict(),
            "images_per_second": self.images_per_second,
            "against_dense": self.against_dense,
            "implied": self.implied,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Choice:
    """Which method is taken, and why."""

    method: str
    why: str


def choose(results: Sequence[Result], ratio: float) -> Choice:
    """The best fidelity by the clock.

    Methods are judged by their fidelity, once they have shown that they save time and not only MACs: at least half of
    the time that the asked ratio stands for. Fidelity decides among those, not speed: at one ratio the methods' clocks
    differ by some tenths, and their errors by several times. Where no method saves that much, the fastest is taken.

    Args:
        results: of the methods; at least one.
        ratio: that was asked for.
    """
    least = _SHARE * (1 - ratio)
    fast = [each for each in results if 1 - 1 / each.against_dense >= least]
    if not fast:
        best = max(results, key=lambda each: each.against_dense)
        return Choice(best.method, f"the fastest; none saves {least:.0%} of the dense model's time on this machine")
    best = max(fast, key=lambda each: each.fidelity.score)
    return Choice(best.method, f"the closest to the dense model of those that save {least:.0%} of its time or more")
