"""Which runs the study consists of."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dge_recipes.config import Config, load_config
from dge_recipes.errors import UserError

__all__ = ["BUDGETS", "DENSE", "VARIANTS", "Variant", "choose_variants", "run_config", "run_folder"]

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


def _target(kind: str, target: float) -> Variant:
    options = ["budget.kind=" + kind, f"budget.target={target}"]
    if kind == "controller":
        options.append("budget.weight=null")
    return Variant(f"dge_{kind}_{target}", (), tuple(options))


_RANDOM = (
    "budget.kind=random",
    f"budget.target={min(BUDGETS)}",
    "budget.high=1.0",
    "budget.weight=null",
    "budget.noiseless_epochs=0",
)
VARIANTS = (
    Variant(DENSE),
    Variant("dense_longer", (), ("model.convert=null", "model.training_mode=dense")),
    *(_target("loss", target) for target in BUDGETS),
    *(_target("controller", target) for target in BUDGETS),
    Variant("dge_random", BUDGETS, _RANDOM),
)


def choose_variants(names: Sequence[str]) -> list[Variant]:
    """The named variants, or all; the dense one is always there, for the others start from it.

    Raises:
        UserError: an unknown name.
    """
    known = {variant.name: variant for variant in VARIANTS}
    for name in names:
        if name not in known:
            raise UserError(f"--rows: no row is called {name!r}; expected some of {', '.join(known)}")
    return [variant for variant in VARIANTS if not names or variant.name in {DENSE, *names}]


def run_folder(output: Path, variant: str, seed: int) -> Path:
    """Where a run of the study is."""
    return output / "runs" / variant / f"seed_{seed}"


def run_config(
    output: Path, variant: Variant, seed: int, epochs: int | None = None, overrides: Sequence[str] = ()
) -> Config:
    """The recipe of one run.

    Args:
        output: the study's folder.
        variant: how to train.
        seed: of everything random.
        epochs: instead of the recipe's.
        overrides: ``section.key=value`` for every run.

    Raises:
        UserError: a wrong override.
    """
    folder = run_folder(output, variant.name, seed)
    common = ["eval.timing_rounds=0", *variant.overrides, *overrides, f"train.seed={seed}", f"output.dir={folder}"]
    if epochs is not None:
        common.append(f"train.epochs={epochs}")
    if variant.name == DENSE:
        return load_config("digits_dense", common)
    return load_config("digits_converted", [*common, f"model.init_from={run_folder(output, DENSE, seed)}"])
