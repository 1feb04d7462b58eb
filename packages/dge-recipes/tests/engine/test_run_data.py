"""A run that is resumed is trained on the images that it was trained on, or says that they have changed."""

import json
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from folder_runs import folder_config
from sample_images import picture, write_folder

from dge_recipes.checkpoints.stored_classes import stored_classes
from dge_recipes.classes import Classes
from dge_recipes.config import Config
from dge_recipes.data.identity import DataIdentity
from dge_recipes.engine import run_data
from dge_recipes.engine.run_data import RunData, check_same_everywhere
from dge_recipes.errors import UserError
from dge_recipes.train import train


@pytest.fixture
def stopped(tmp_path: Path) -> Config:
    """A run that has done the first of two epochs of three steps, on 12 images of cats and dogs."""
    write_folder(tmp_path / "data", per_class=6)
    config = folder_config(tmp_path / "data", tmp_path / "run")
    train(config)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000006")
    (tmp_path / "run" / "summary.json").unlink()
    return config


def _accepting(config: Config) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update={"changed": "accept"})})


def _newest(config: Config) -> Path:
    return sorted((Path(config.output.dir) / "checkpoints").glob("step_*"))[-1]


def _rename_class(data: Path) -> None:
    for part in ("train", "val"):
        (data / part / "dog").rename(data / part / "wolf")


def _replace_class(data: Path) -> None:
    for part in ("train", "val"):
        shutil.rmtree(data / part / "cat")
        shutil.copytree(data / part / "dog", data / part / "bird")


def _add_class(data: Path) -> None:
    for part in ("train", "val"):
        shutil.copytree(data / part / "dog", data / part / "wolf")


def _swap_classes(data: Path) -> None:
    for part in ("train", "val"):
        (data / part / "cat" / "0.png").rename(data / part / "dog" / "cat.png")


def _lose_most(data: Path) -> None:
    for number in range(5):
        (data / "train" / "dog" / f"{number}.png").unlink()


def test_a_run_records_its_data(stopped: Config) -> None:
    summary = train(stopped, resume="auto")
    assert summary["data"]["classes"] == ["cat", "dog"]
    assert (summary["data"]["train"]["num_images"], summary["data_changed"]) == (12, [])
    content = json.loads((_newest(stopped) / "data.json").read_text(encoding="utf-8"))
    assert content["val"]["digest"] == summary["data"]["val"]["digest"]
    assert stored_classes(_newest(stopped) / "model.safetensors").names == ("cat", "dog")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_rename_class, r"training images were cat, dog; are cat, wolf \(missing: dog; unknown: wolf\)"),
        (_replace_class, r"training images were cat, dog; are bird, dog \(missing: cat; unknown: bird\)"),
        (_add_class, r"training images were cat, dog; are cat, dog, wolf \(unknown: wolf\)"),
    ],
)
def test_other_classes_end_it_accepted_or_not(stopped: Config, change: Callable[[Path], None], words: str) -> None:
    change(Path(stopped.data.root))  # type: ignore[union-attr]
    for config in (stopped, _accepting(stopped)):
        with pytest.raises(UserError, match=rf"cannot continue .*step_00000003: the classes of its {words}"):
            train(config, resume="auto")
    assert not (Path(stopped.output.dir) / "summary.json").exists()


@pytest.mark.parametrize(
    ("change", "words", "steps"),
    [
        (lambda data: (data / "train/dog/new.png").write_bytes(picture(3)), "training images: class dog had 6 im", 6),
        (lambda data: (data / "val/cat/2.png").unlink(), "held-out images: class cat had 6 images and has 5$", 6),
        (lambda data: (data / "val/cat/2.png").rename(data / "val/cat/x.png"), "class cat has other images", 6),
        (_swap_classes, "training images: class cat had 6 images and has 5, class dog had 6 images and has 7; held", 6),
        (_lose_most, "training images: class dog had 6 images and has 1$", 4),  # 3 steps, then an epoch of one
        (
            lambda data: [(data / f"train/dog/{n}.png").write_bytes(picture(n)) for n in range(20, 28)],
            "training images: class dog had 6 images and has 14$",
            8,  # 3 steps, then an epoch of five
        ),
    ],
)
def test_other_images_end_it_unless_accepted(
    stopped: Config, change: Callable[[Path], None], words: str, steps: int
) -> None:
    change(Path(stopped.data.root))  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"its data have changed: .*; data.changed=accept goes on with these") as error:
        train(stopped, resume="auto")
    summary = train(_accepting(stopped), resume="auto")
    changes: list[dict[str, Any]] = summary["data_changed"]
    assert [each["step"] for each in changes] == [3]
    assert re.search(words, changes[0]["what"])
    assert changes[0]["what"] in str(error.value)
    assert summary["steps"] == steps
    last = json.loads((Path(stopped.output.dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert (last["step"], last["epoch"]) == (steps, 2)
    # It stays recorded, and these images are the run's own from here on.
    again = train(stopped, resume="auto")
    assert (again["data_changed"], again["steps"]) == (changes, steps)


def test_every_change_stays_recorded(stopped: Config) -> None:
    images = Path(stopped.data.root) / "train" / "cat"  # type: ignore[union-attr]
    for name in ("one.png", "two.png"):
        (images / name).write_bytes(picture(3))
        summary = train(_accepting(stopped), resume="auto")
    told = [f"training images: class cat had {count} images and has {count + 1}" for count in (6, 7)]
    assert [(each["step"], each["what"]) for each in summary["data_changed"]] == [(3, told[0]), (6, told[1])]


def test_the_learning_rate_ends_where_it_should(stopped: Config) -> None:
    for number in range(20, 28):
        (Path(stopped.data.root) / "train" / "dog" / f"{number}.png").write_bytes(picture(number))  # type: ignore[union-attr]
    frequent = stopped.model_copy(update={"train": stopped.train.model_copy(update={"log_every": 1})})
    train(_accepting(frequent), resume="auto")
    lines = (Path(stopped.output.dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [record["lr"] for record in map(json.loads, lines) if record["kind"] == "train"][-5:]
    peak, low = stopped.optim.lr, stopped.schedule.min_lr
    half = (peak + low) / 2  # of the cosine, at the first of two epochs' end
    assert rates[0] == pytest.approx(half, rel=1e-6)
    assert all(first > second for first, second in pairwise(rates))


def test_data_that_moved_are_the_same(stopped: Config, tmp_path: Path) -> None:
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    moved = stopped.model_copy(update={"data": stopped.data.model_copy(update={"root": str(tmp_path / "elsewhere")})})
    assert train(moved, resume="auto")["data_changed"] == []


def test_checkpoints_of_earlier_versions_are_not_compared(stopped: Config) -> None:
    folder = _newest(stopped)
    (folder / "data.json").unlink()
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    del manifest["files"]["data.json"]
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (Path(stopped.data.root) / "train" / "dog" / "new.png").write_bytes(picture(3))  # type: ignore[union-attr]
    summary = train(stopped, resume="auto")
    assert (summary["data_changed"], summary["data"]["train"]["num_images"]) == ([], 13)


def test_every_process_must_see_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    data = RunData({part: DataIdentity(Classes(1, ("ant",)), 3, "abc", ((3, "x"),)) for part in ("train", "val")})
    check_same_everywhere(data, Accelerator(cpu=True))
    same = (Classes(1, ("ant",)), 3, "abc")
    for other, words in (
        ((same[0], 2, "abd"), r"processes 0 and 1 see other held-out images: 3 and 2, or of other names; every"),
        ((Classes(1, ("bee",)), 3, "abc"), r"were ant; are bee \(missing: ant; unknown: bee\); every"),
    ):
        there = {"train": same, "val": other}
        monkeypatch.setattr(run_data, "gather_object", lambda own, there=there: [*own, there])
        with pytest.raises(UserError, match=words):
            check_same_everywhere(data, Accelerator(cpu=True))
