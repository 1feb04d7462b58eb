"""Runs of a second on image folders, for tests of what a run knows of its data."""

from pathlib import Path

from sample_images import write_folder

from dge_recipes.config import Config, load_config
from dge_recipes.train import train

__all__ = ["folder_config", "small_keys", "write_lab"]


def small_keys(root: Path, output: Path) -> list[str]:
    """Overrides that make an ImageNet recipe small: 2 x 2 tokens, one block, 4 images per step, two epochs."""
    return [
        "model.kwargs.img_size=32",
        "model.kwargs.embed_dim=16",
        "model.kwargs.num_heads=2",
        "model.kwargs.depth=1",
        "budget.target=0.95",
        f"data.root={root}",
        "data.image_size=32",
        "data.num_classes=null",
        "data.workers=0",
        "schedule.warmup_epochs=0",
        "optim.lr_batch=null",
        "train.epochs=2",
        "train.batch_size=4",
        "train.ema_decay=null",
        "checkpoint.keep_last=9",
        "eval.batch_size=4",
        "eval.timing_rounds=0",
        f"output.dir={output}",
        "output.trackers=[]",
    ]


def folder_config(root: Path, output: Path, *overrides: str) -> Config:
    """A small run on the images below `root`, which ``sample_images.write_folder`` may have written."""
    return load_config("deit_dge_tiny_256", [*small_keys(root, output), *overrides])


def write_lab(root: Path) -> None:
    """Image folders called after their classes, such as ``bee_cat``, and in ``run`` a run on ants and bees."""
    for classes in (("ant", "bee"), ("bee", "cat"), ("ant", "bee", "cat"), ("bee",)):
        write_folder(root / "_".join(classes), classes, per_class=4)
    train(folder_config(root / "ant_bee", root / "run", "train.ema_decay=0.5"))
