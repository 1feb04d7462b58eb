"""Files that are no images: counted by extension, told once for each part by the main process, and in the summary."""

import json
import logging
import pickle
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from sample_images import add, picture, write_folder, write_json
from torch import distributed

from dge_recipes.config import Config, ImageFolderData, INaturalistData, TarData, WebDatasetData, load_config
from dge_recipes.data.image_files import LeftOut
from dge_recipes.data.image_sets import open_source
from dge_recipes.errors import UserError
from dge_recipes.train import train


def test_counts_and_words() -> None:
    left_out = LeftOut()
    assert (left_out.total(), left_out.as_dict(), str(left_out)) == (0, {}, "no files")
    left_out.add("a/1.heic")
    assert left_out.told("val") == "val: 1 file was left out: 1 .heic; for example a/1.heic"
    for name in ("2.TXT", "3.heic", "README", "b.c/README", "4.txt", "5.HEIC"):
        left_out.add(name)
    assert list(left_out.as_dict().items()) == [(".heic", 3), (".txt", 2), ("without extension", 2)]
    words = "7 files were left out: 3 .heic, 2 .txt, 2 without extension; for example a/1.heic"
    assert left_out.told("val") == f"val: {words}"


def _mixed(root: Path) -> None:
    """Two classes of images of many kinds; beside them what is none, and what is hidden."""
    write_folder(root, per_class=2)
    for part in ("train", "val"):
        for number, name in enumerate(("cat/a.gif", "cat/b.JFIF", "cat/sub/c.webp", "dog/d.Tiff", "dog/e.jp2")):
            path = root / part / name
            path.parent.mkdir(exist_ok=True)
            kind = Image.registered_extensions()[path.suffix.lower()]
            Image.new("RGB", (40, 50), (50 + number, 0, 0)).save(path, format=kind)
        for name in ("cat/1.heic", "cat/2.HEIC", "cat/sub/notes.txt", "dog/LICENSE", "stray.png"):
            (root / part / name).write_bytes(picture(1))
        for name in ("cat/._0.png", "dog/.DS_Store", ".DS_Store", "._cat", "__MACOSX/cat/._0.png", ".cache/a.png"):
            (root / part / name).parent.mkdir(parents=True, exist_ok=True)
            (root / part / name).write_bytes(b"twin")


_LEFT_OUT = {".heic": 2, ".png": 1, ".txt": 1, "without extension": 1}


def test_a_class_folder_takes_what_pillow_opens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _mixed(tmp_path)
    source = open_source(ImageFolderData(name="imagefolder", root=str(tmp_path)), "val")
    names = [Path(source.name(index)).relative_to(tmp_path / "val").as_posix() for index in range(len(source))]
    assert names[:5] == ["cat/0.png", "cat/1.png", "cat/a.gif", "cat/b.JFIF", "cat/sub/c.webp"]
    assert names[5:] == ["dog/0.png", "dog/1.png", "dog/d.Tiff", "dog/e.jp2"]
    assert [source.label(index) for index in range(9)] == [0] * 5 + [1] * 4
    assert all(source.read(index).convert("RGB").size == (40, 50) for index in range(9))
    assert source.left_out.as_dict() == _LEFT_OUT
    assert pickle.loads(pickle.dumps(source)).left_out.as_dict() == _LEFT_OUT  # as spawned workers get it
    (line,) = caplog.messages
    counts = "5 files were left out: 2 .heic, 1 .png, 1 .txt, 1 without extension"
    assert line.startswith(f"val: {counts}; for example {tmp_path}/val/")


def test_tars_take_the_same(tmp_path: Path) -> None:
    _mixed(tmp_path / "folders")
    for part in ("train", "val"):
        with tarfile.open(tmp_path / f"{part}.tar", "w") as tar:
            for folder in ("cat", "dog"):
                tar.add(tmp_path / "folders" / part / folder, folder, filter=_without_subfolders)
    source = open_source(TarData(name="tar", root=str(tmp_path)), "train")
    assert (len(source), source.num_classes) == (8, 2)
    assert source.left_out.as_dict() == {".heic": 2, "without extension": 1}


def _without_subfolders(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "sub" in info.name else info


def test_webdataset_leaves_out_samples_without_images_but_no_companions(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for number, kind in enumerate(("gif", "JFIF", "bmp")):
            content = picture(number, Image.registered_extensions()[f".{kind.lower()}"])
            add(tar, f"{number}.{kind}", content)
            add(tar, f"{number}.txt", b"a caption")
            add(tar, f"{number}.cls", b"0")
        for name in ("3.cls", "3.heic", "4.cls", "README", "._0.gif", ".DS_Store", "__MACOSX/._0.gif"):
            add(tar, name, b"0")
    source = open_source(WebDatasetData(name="webdataset", root=str(tmp_path)), "train")
    assert len(source) == 3
    assert source.left_out.as_dict() == {".cls": 2, ".heic": 1, "without extension": 1}


def test_inaturalist_2021_and_the_lists_before(tmp_path: Path) -> None:
    species = "_Animalia_Annelida_Clitellata_Haplotaxida_Lumbricidae_Lumbricus_terrestris"
    for number in range(2):
        folder = tmp_path / "2021_train" / f"{number:05d}{species}"
        folder.mkdir(parents=True)
        for name in ("b.png", "a.gif", "notes.txt", "._b.png", ".DS_Store"):
            (folder / name).write_bytes(picture(number, "GIF" if name == "a.gif" else "PNG"))
    for name in (".DS_Store", "__MACOSX/a.png"):
        (tmp_path / "2021_train" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "2021_train" / name).touch()
    source = open_source(INaturalistData(name="inaturalist", root=str(tmp_path), year=2021), "train")
    assert [Path(source.name(index)).name for index in range(4)] == ["a.gif", "b.png"] * 2
    assert ([source.label(index) for index in range(4)], source.num_classes) == ([0, 0, 1, 1], 2)
    assert source.left_out.as_dict() == {".txt": 2}
    for name in ("Birds/1/a.jpg", "Birds/1/._a.jpg", "Birds/.DS_Store", "Frogs/0/b.jpg", ".DS_Store", "Frogs/0/c.txt"):
        path = tmp_path / "2018" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(1, "JPEG"))
    write_json(tmp_path / "train2018.json", {"images": [{"file_name": "train_val2018/Frogs/0/b.jpg"}]})
    older = open_source(INaturalistData(name="inaturalist", root=str(tmp_path)), "train")
    assert (len(older), older.num_classes, older.label(0), older.left_out.as_dict()) == (1, 2, 0, {})


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("00000_a", "00001_b"), r"got the folder 00000_a, expected 00000 and seven names"),
        (("00001_a_b_c_d_e_f_g",), r"got the folder 00001_a_b_c_d_e_f_g, expected 00000 and"),
        ((), r"2021_valid holds no images; left out: no files"),
        (("00000_a_b_c_d_e_f_g",), r"2021_valid holds no images; left out: no files"),
    ],
)
def test_folders_that_are_not_inaturalist_s_of_2021(tmp_path: Path, names: tuple[str, ...], words: str) -> None:
    (tmp_path / "2021_valid").mkdir()
    for name in names:
        (tmp_path / "2021_valid" / name).mkdir()
    with pytest.raises(UserError, match=words):
        open_source(INaturalistData(name="inaturalist", root=str(tmp_path), year=2021), "val")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("Birds/one",), "got the folder Birds/one, expected the number of a class"),
        (("Birds/0", "Frogs/0"), "Birds/0 and Frogs/0 are the same class"),
        (("Birds/0", "Frogs/2"), "has no folder for class 1"),
    ],
)
def test_folders_that_are_not_inaturalist_s_before(tmp_path: Path, names: tuple[str, ...], words: str) -> None:
    for name in names:
        (tmp_path / "2018" / name).mkdir(parents=True)
    with pytest.raises(UserError, match=words):
        open_source(INaturalistData(name="inaturalist", root=str(tmp_path)), "val")


def test_a_class_of_nothing_that_pillow_opens(tmp_path: Path) -> None:
    write_folder(tmp_path)
    for name in ("bird/1.heic", "bird/2.HEIC", "bird/more/notes.txt", "bird/._1.png", "eel/.keep"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).touch()
    words = r"train: no images that Pillow opens in the class folders bird \(2 \.heic, 1 \.txt\), eel \(no files\)$"
    with pytest.raises(UserError, match=words):
        open_source(ImageFolderData(name="imagefolder", root=str(tmp_path)), "train")
    for number in range(5):
        (tmp_path / "train" / f"fox_{number}").mkdir()
    with pytest.raises(UserError, match=r"fox_0 \(no files\) and 4 more$"):
        open_source(ImageFolderData(name="imagefolder", root=str(tmp_path)), "train")


def test_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "a.png").write_bytes(picture(1))
    with pytest.raises(UserError, match="train holds no class folders"):
        open_source(ImageFolderData(name="imagefolder", root=str(tmp_path)), "train")


def test_other_processes_than_the_main_one_say_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    _mixed(tmp_path)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    told = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        caplog.clear()
        open_source(ImageFolderData(name="imagefolder", root=str(tmp_path)), "val")
        told.append(len(caplog.messages))
    assert told == [1, 0]


def _run(root: Path, output: Path) -> Config:
    model = ("img_size=32", "depth=1", "embed_dim=16", "num_heads=2")
    keys = ("train.epochs=1", "train.batch_size=4", "schedule.warmup_epochs=0", "optim.lr_batch=null")
    data = ("image_size=32", "num_classes=2", "workers=2", "auto_augment=null", f"root={root}")
    ends = (f"output.dir={output}", "eval.timing_rounds=0", "eval.batch_size=4", "train.ema_decay=null")
    parts = (*(f"model.kwargs.{each}" for each in model), *(f"data.{each}" for each in data))
    return load_config("deit_tiny_256", [*parts, *keys, *ends])


def test_a_run_tells_once_for_each_part_and_sums_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _mixed(tmp_path / "data")
    (tmp_path / "data" / "val" / "cat" / "more.heic").touch()
    with caplog.at_level(logging.WARNING):
        train(_run(tmp_path / "data", tmp_path / "run"))
    assert sorted(line.partition(":")[0] for line in caplog.messages if "left out" in line) == ["train", "val"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["images"] == 9
    assert summary["left_out"] == {"train": _LEFT_OUT, "val": {**_LEFT_OUT, ".heic": 3}}
