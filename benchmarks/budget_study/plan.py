"""Which runs a study consists of."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dge_recipes.config import Config, load_config
from dge_recipes.errors import UserError

__all__ = [
    "BUDGETS",
    "DENSE",
    "DIGITS",
    "STUDIES",
    "VARIANTS",
    "Study",
    "Variant",
    "choose_variants",
    "run_config",
    "run_folder",
]

BUDGETS = (0.4, 0.5, 0.7)
DENSE = "dense"


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        name: of its folder, and in the table.
        budgets: MAC ratios that its one checkpoint is evaluated at; empty: as it was trained.
        overrides: what it changes in the recipe.
    """

    name: str
    budgets: tuple[float, ...] = ()
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """The runs on one data set.

    Attributes:
        title: what the pictures are headed by.
        dense, converted: the recipes of the dense model and of its conversion.
        variants: the ways to train, the dense one first.
        seeds: one run of each variant per seed.
        timing: whether inference is timed.
    """

    title: str
    dense: str
    converted: str
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    timing: bool


def _target(kind: str, target: float) -> Variant:
    options = ["budget.kind=" + kind, f"budget.target={target}"]
    if kind == "controller":  # it meets the ratio without noise while it trains with noise
        options += ["budget.weight=null", "budget.noiseless_epochs=0"]
    return Variant(f"dge_{kind}_{target}", (), tuple(options))


_RANDOM = (
    "budget.kind=random",
    f"budget.target={min(BUDGETS)}",
    "budget.high=1.0",
    "budget.weight=null",
    "budget.noiseless_epochs=0",
)
_LONGER = Variant("dense_longer", (), ("model.convert=null", "model.training_mode=dense"))
_ANY_BUDGET = Variant("dge_random", BUDGETS, _RANDOM)
VARIANTS = (
    Variant(DENSE),
    _LONGER,
    *(_target("loss", target) for target in BUDGETS),
    *(_target("controller", target) for target in BUDGETS),
    _ANY_BUDGET,
)
DIGITS = Study("Handwritten digits", "digits_dense", "digits_converted", VARIANTS, (0, 1, 2), timing=False)
# In the order in which they tell most, because a time limit may cut the last ones off.
_SHAPES = (Variant(DENSE), _target("controller", 0.5), _LONGER, _target("loss", 0.5), _ANY_BUDGET)
STUDIES = {
    "digits": DIGITS,
    "shapes": Study("Drawn shapes", "shapes_dense", "shapes_converted", _SHAPES, (0,), timing=True),
}


def choose_variants(names: Sequence[str], study: Study = DIGITS) -> list[Variant]:
    """The named variants, or all; the dense one is always there, for the others start from it.

    Args:
        names: of variants; none means all.
        study: whose.

    Raises:
        UserError: an unknown name.
    """
    known = {variant.name: variant for variant in study.variants}
    for name in names:
        if name not in known:
            raise UserError(f"--rows: no row is called {name!r}; expected some of {', '.join(known)}")
    return [variant for variant in study.variants if not names or variant.name in {DENSE, *names}]


def run_folder(output: Path, variant: str, seed: int) -> Path:
    """Where a run of the study is."""
    return output / "runs" / variant / f"seed_{seed}"


def run_config(
    output: Path,
    variant: Variant,
    seed: int,
    epochs: int | None = None,
    overrides: Sequence[str] = (),
    *,
    study: Study = DIGITS,
    timing: bool = False,
) -> Config:
    """The recipe of one run.

    Args:
        output: the study's folder.
        variant: how to train.
        seed: of everything random.
        epochs: instead of the recipe's.
        overrides: ``section.key=value`` for every run.
        study: that it belongs to.
        timing: time inference, as often as the recipe says.

    Raises:
        UserError: a wrong override.
    """
    folder = run_folder(output, variant.name, seed)
    common = [*variant.overrides, *overrides, f"train.seed={seed}", f"output.dir={folder}"]
    if not timing:
        common.insert(0, "eval.timing_rounds=0")
    if epochs is not None:
        common.append(f"train.epochs={epochs}")
    if variant.name == DENSE:
        return load_config(study.dense, common)
    return load_config(study.converted, [*common, f"model.init_from={run_folder(output, DENSE, seed)}"])
