"""Hugging Face data on disk, as the ``datasets`` package writes and reads it."""

import io
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sample_images import picture

from dge_recipes.config import Config, HuggingFaceData, load_config
from dge_recipes.data.image_sets import check_same_classes, open_source
from dge_recipes.data.images import UNREADABLE, HeldOutImages
from dge_recipes.data.loaders import build_held_out
from dge_recipes.data.pixels import to_rgb
from dge_recipes.engine.reporting import Reporter
from dge_recipes.errors import RunStopped, UserError
from dge_recipes.train import train


@pytest.fixture
def datasets() -> Any:
    module = pytest.importorskip("datasets")
    module.disable_progress_bars()
    return module


def _config(root: Path, **keys: object) -> HuggingFaceData:
    return HuggingFaceData.model_validate({"name": "huggingface", "root": str(root), "image_size": 32, **keys})


def _rows(datasets: Any, images: Sequence[bytes | None], labels: Sequence[object], kind: Any = None) -> Any:
    """A Dataset of encoded images; labels are ClassLabel unless another feature is given."""
    label = datasets.ClassLabel(names=["ant", "bee", "cat"]) if kind is None else kind
    encoded = [image and {"bytes": image, "path": None} for image in images]
    features = datasets.Features({"image": datasets.Image(), "label": label})
    return datasets.Dataset.from_dict({"image": encoded, "label": list(labels)}, features=features)


def _save(datasets: Any, root: Path, **splits: Any) -> None:
    datasets.DatasetDict(splits).save_to_disk(str(root))


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs the datasets package: pip install datasets"):
        open_source(_config(tmp_path), "train")


def test_images_and_labels(datasets: Any, tmp_path: Path) -> None:
    encoded = [picture(7), picture(200, "JPEG")]
    number = datasets.Value("int64")
    train = _rows(datasets, encoded, [2, 0]).with_format("torch")  # a format is saved too, and is none of our business
    _save(datasets, tmp_path, train=train, validation=_rows(datasets, encoded, [4, 1], number))
    source = open_source(_config(tmp_path), "train")
    assert (len(source), source.num_classes) == (2, 3)
    assert [source.label(row) for row in range(2)] == [2, 0]
    assert source.read(0).getpixel((0, 0)) == (7, 21, 9)
    red = source.read(1).getpixel((0, 0))[0]  # type: ignore[index]
    assert abs(red - 200) <= 4
    assert source.name(1) == f"{tmp_path}: train row 1"
    assert open_source(_config(tmp_path), "val").num_classes == 5
    counted = open_source(_config(tmp_path, num_classes=9, train_split="validation"), "train")
    assert (counted.num_classes, [counted.label(row) for row in range(2)]) == (9, [4, 1])


def test_classes_in_another_order(datasets: Any, tmp_path: Path) -> None:
    other = datasets.ClassLabel(names=["cat", "bee", "ant"])
    pictures = [picture(1)]
    _save(
        datasets, tmp_path, train=_rows(datasets, pictures, [0]), validation=_rows(datasets, pictures, [0], kind=other)
    )
    with pytest.raises(UserError, match=r"must hold the same classes, but have them in another order \(.*train row 0"):
        check_same_classes(*(open_source(_config(tmp_path), part) for part in ("train", "val")))  # type: ignore[arg-type]


def test_mistakes(datasets: Any, tmp_path: Path) -> None:
    one = [picture(1)]
    text = datasets.Value("string")
    good = _rows(datasets, one, [0])
    good.save_to_disk(str(tmp_path / "single"))
    splits = {"train": good, "negative": _rows(datasets, one, [-1]), "none": _rows(datasets, one, [None])}
    splits["words"] = _rows(datasets, one, ["bee"], text)
    splits["plain"] = datasets.Dataset.from_dict({"image": ["a"], "label": [0]})
    _save(datasets, tmp_path / "d", **splits)
    _save(datasets, tmp_path / "empty", train=_rows(datasets, [], []))
    (tmp_path / "folder").mkdir()
    for root, keys, words in (
        ("gone", {}, r"no Hugging Face data set on disk at .*gone; expected what DatasetDict.save_to_disk wrote"),
        ("folder", {}, "no Hugging Face data set on disk at"),
        ("single", {}, "single is a single Dataset; expected a DatasetDict"),
        ("empty", {}, "empty holds a split without rows"),
        ("d", {"train_split": "validation"}, "has no split 'validation'; it has train, negative, none, words, plain"),
        ("d", {"image_column": "picture"}, "d: train has no column 'picture'; it has image, label"),
        ("d", {"train_split": "plain"}, "d: plain: column 'image' holds Value, expected datasets.Image"),
        ("d", {"train_split": "negative"}, "d: negative row 0: got label -1, expected 0 to 2"),
        ("d", {"train_split": "none"}, "row 0: got None in column 'label', expected a class number"),
        ("d", {"train_split": "words"}, "row 0: got 'bee' in column 'label', expected a class number"),
        ("d", {"num_classes": 2}, r"\(train\) has 3 classes; data.num_classes says 2"),
    ):
        with pytest.raises(UserError, match=words):
            open_source(_config(tmp_path / root, **keys), "train")


def test_unreadable_images(datasets: Any, tmp_path: Path) -> None:
    rows = [picture(1), b"no image", picture(2)[:60], None]
    _save(datasets, tmp_path / "d", validation=_rows(datasets, rows, [0, 1, 2, 0]))
    config = _config(tmp_path / "d")
    strict = HeldOutImages(open_source(config, "val"), config, tmp_path)
    for row, words in ((1, "cannot identify"), (2, "truncated"), (3, "holds no image")):
        with pytest.raises(UserError, match=f"d: validation row {row} cannot be read as an image: .*{words}"):
            strict[row]
    lenient = HeldOutImages(open_source(config, "val"), config.model_copy(update={"unreadable": "skip"}), tmp_path)
    assert [lenient[row][1] for row in range(4)] == [0, UNREADABLE, UNREADABLE, UNREADABLE]
    assert len((tmp_path / "unreadable_images.txt").read_text(encoding="utf-8").splitlines()) == 3


def test_pictures_come_as_they_are_stored(datasets: Any, tmp_path: Path) -> None:
    exif, lying = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (50, 40)).save(lying, "JPEG", exif=exif)
    grey = datasets.Dataset.from_dict(
        {"image": [{"bytes": lying.getvalue(), "path": None}], "label": [0]},
        features=datasets.Features({"image": datasets.Image(mode="L"), "label": datasets.Value("int64")}),
    )
    path = tmp_path / "gone.jpg"
    path.write_bytes(lying.getvalue())
    rows = _rows(datasets, [lying.getvalue()], [0])
    _save(datasets, tmp_path / "d", train=rows, validation=rows, grey=grey)
    source = open_source(_config(tmp_path / "d"), "train")
    assert source.read(0).size == (50, 40)
    assert to_rgb(source.read(0), upright=True).size == (40, 50)
    assert open_source(_config(tmp_path / "d", train_split="grey"), "train").read(0).mode == "L"
    source._rows = [{"image": {"bytes": None, "path": str(path)}}]  # type: ignore[attr-defined]
    assert source.read(0).size == (50, 40)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        source.read(0)


def _run(root: Path, output: Path) -> Config:
    model = ("model.kwargs.img_size=32", "model.kwargs.depth=1", "data.image_size=32")
    short = ("train.epochs=2", "train.batch_size=4", "schedule.warmup_epochs=0", "optim.lr_batch=null")
    data = ("data.name=huggingface", f"data.root={root}", "data.num_classes=3", "data.workers=2")
    ends = (f"output.dir={output}", "eval.timing_rounds=0", "eval.batch_size=5", "train.eval_every=2")
    return load_config("deit_tiny_256", [*model, *short, *data, *ends])


def test_a_run_with_workers_resumes_exactly(datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "d"
    rows = _rows(datasets, [picture(9 * row) for row in range(26)], [row % 3 for row in range(26)])
    _save(datasets, root, train=rows, validation=rows.select(range(7, 18)))
    whole, stopped = _run(root, tmp_path / "whole"), _run(root, tmp_path / "stopped")
    in_this_process = whole.model_copy(update={"data": whole.data.model_copy(update={"workers": 0})})
    train(in_this_process)
    original = Reporter.step

    def signalled(reporter: Reporter) -> None:
        original(reporter)
        if reporter._progress.step == 8:  # of 12, the second of the second epoch
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(RunStopped, match="at step 8 of 12"):
        patch.setattr(Reporter, "step", signalled)
        train(stopped)
    assert train(stopped, resume="auto")["images"] == 11
    first, second = (
        load_file(tmp_path / name / "checkpoints/step_00000012/ema.safetensors") for name in ("whole", "stopped")
    )
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def test_order_of_held_out_images_from_workers(datasets: Any, tmp_path: Path) -> None:
    rows = _rows(datasets, [picture(9 * row) for row in range(26)], [row % 3 for row in range(26)])
    _save(datasets, tmp_path / "d", train=rows, validation=rows)
    loader = build_held_out(_run(tmp_path / "d", tmp_path / "run")).loader
    reds = torch.cat([images[:, 0, 0, 0] for images, _ in loader])
    expected = (9 * torch.arange(26) / 255 - 0.485) / 0.229
    assert torch.allclose(reds, expected, atol=1e-2)
