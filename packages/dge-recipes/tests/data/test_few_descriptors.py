"""Runs on hundreds of tars, where a process may have 64 files open."""

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sample_images import add, picture

_SCRIPT = """
import os, resource, signal, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from dge_recipes.config import load_config
from dge_recipes.errors import RunStopped
from dge_recipes.evaluate import evaluate_checkpoint
from dge_recipes.evaluation.target import find_target
from dge_recipes.train import train
from dge_recipes.engine.reporting import Reporter

step = Reporter.step
def stopped(reporter):
    step(reporter)
    if reporter._progress.step == 5:  # of 6, in the second epoch
        os.kill(os.getpid(), signal.SIGTERM)

for workers in (0, 2):
    overrides = [*sys.argv[2:], f"data.workers={workers}", f"output.dir={sys.argv[1]}/{workers}"]
    config = load_config("deit_tiny_256", overrides)
    Reporter.step = stopped
    try:
        train(config)
    except RunStopped as request:
        print(request)
    Reporter.step = step
    print(train(config, resume="auto")["images"])
    print(evaluate_checkpoint(find_target(config.output.dir, None, []))["images"])
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 tars of an image with a label each: classes, or shards."""
    folder = tmp_path_factory.mktemp("tars")
    (folder / "train").mkdir()
    for number in range(300):
        with tarfile.open(folder / "train" / f"n{number:03d}.tar", "w") as tar:
            add(tar, "0.png", picture(number % 256))
            add(tar, "0.cls", b"%d" % (number % 2))
    (folder / "val").symlink_to("train")
    return folder


@pytest.mark.parametrize(
    "data",
    [
        ("data.name=tar", "data.num_classes=300"),
        (
            "data.name=webdataset",
            "data.num_classes=2",
            "data.train_shards=train/*.tar",
            "data.held_out_shards=val/*.tar",
        ),
    ],
    ids=["tar", "webdataset"],
)
def test_two_epochs_a_resume_and_an_evaluation(
    root: Path, tmp_path: Path, command: Callable[..., Any], data: tuple[str, ...]
) -> None:
    model = ("img_size=32", "depth=1", "embed_dim=16", "num_heads=2")
    keys = ("epochs=2", "batch_size=100", "device=cpu", "ema_decay=null")
    others = ("schedule.warmup_epochs=0", "optim.lr_batch=null", "eval.timing_rounds=0", "eval.batch_size=100")
    pictures = ("data.image_size=32", "data.auto_augment=null", f"data.root={root}")
    overrides = (*(f"model.kwargs.{each}" for each in model), *(f"train.{each}" for each in keys), *others, *pictures)
    result = command("-c", _SCRIPT, str(tmp_path), *overrides, *data)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if not line.startswith(("|", "300 images"))]
    assert [line for line in lines if "5 of 6" in line] == lines[::3]
    assert [line for line in lines if line == "300"] == lines[1:3] + lines[4:]
    assert len(lines) == 6
