"""Tar files: labels by folder or by tar, one order everywhere, reading from several processes at once."""

import os
import tarfile
from pathlib import Path

import pytest
from sample_images import add, picture

from dge_recipes.data.tar import TarSource
from dge_recipes.errors import UserError


def _write(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            add(tar, name, content)


def _reds(source: TarSource) -> list[tuple[int, int]]:
    return [(source.read(index).getpixel((0, 0))[0], source.label(index)) for index in range(len(source))]  # type: ignore[index]


def test_one_tar_with_folders_in_any_order(tmp_path: Path) -> None:
    files = {f"train/{name}/{i}.png": picture(10 * j + i) for j, name in enumerate(("b", "a")) for i in (1, 0)}
    _write(tmp_path / "train.tar", {**files, "train/readme.txt": b"hello"})
    source = TarSource(tmp_path, "train")
    assert (source.classes, source.num_classes) == (["a", "b"], 2)
    assert _reds(source) == [(10, 0), (11, 0), (0, 1), (1, 1)]
    assert source.name(0) == f"{tmp_path / 'train.tar'}: train/a/0.png"


def test_a_tar_per_class_and_tars_in_a_tar(tmp_path: Path) -> None:
    for number, name in ((2, "dog"), (1, "cat")):
        _write(tmp_path / "val" / f"{name}.tar", {"0.png": picture(number), "1.png": picture(number + 10)})
    expected = [(1, 0), (11, 0), (2, 1), (12, 1)]
    assert _reds(TarSource(tmp_path, "val")) == expected
    outer = {f"{path.name}": path.read_bytes() for path in (tmp_path / "val").iterdir()}
    _write(tmp_path / "train.tar", outer)
    nested = TarSource(tmp_path, "train")
    assert (nested.classes, _reds(nested)) == (["cat", "dog"], expected)


def test_processes_do_not_disturb_each_other(tmp_path: Path) -> None:
    _write(tmp_path / "train.tar", {f"a/{i:02d}.png": picture(i) for i in range(40)})
    source = TarSource(tmp_path, "train")
    expected = _reds(source)  # the file is open before the processes part
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            try:
                os._exit(0 if all(_reds(source) == expected for _ in range(20)) else 1)
            finally:
                os._exit(2)
        children.append(child)
    assert all(_reds(source) == expected for _ in range(20))
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tar files at .*; expected .*train.tar or .*train/\*.tar"):
        TarSource(tmp_path, "train")
    _write(tmp_path / "train.tar", {"a/readme.txt": b"hello"})
    with pytest.raises(UserError, match="hold no images for train"):
        TarSource(tmp_path, "train")
    (tmp_path / "train.tar").write_bytes(b"no tar file at all" * 100)
    with pytest.raises(UserError, match="cannot be read as an uncompressed tar file"):
        TarSource(tmp_path, "train")
    _write(tmp_path / "train.tar", {"a/0.png": picture(1)})
    source = TarSource(tmp_path, "train")
    os.truncate(tmp_path / "train.tar", 600)
    with pytest.raises(OSError, match=r"ends inside a/0\.png"):
        source.read(0)


def test_any_image_and_extensions_in_any_case(tmp_path: Path) -> None:
    for name, kind in (("cat.tar", "GIF"), ("dog.TAR", "WEBP")):
        _write(tmp_path / "val" / name, {"0.x": b"", f"1.{kind}": picture(9, kind), "2.txt": b"", "3.JPG": picture(5)})
    source = TarSource(tmp_path, "val")
    assert (len(source), source.classes) == (4, ["cat", "dog"])
    assert source.left_out.as_dict() == {".txt": 2, ".x": 2}


def test_members_with_a_dot_before_them_and_hidden_twins(tmp_path: Path) -> None:
    twins = dict.fromkeys(("._0.png", "a/._0.png", "a/.DS_Store", "__MACOSX/a/._0.png", "._n.tar", ".a.tar"), b"twin")
    _write(tmp_path / "train.tar", {**twins, "./a/0.png": picture(3), ".//b//0.png": picture(4)})
    source = TarSource(tmp_path, "train")
    assert (source.classes, _reds(source), source.left_out.as_dict()) == (["a", "b"], [(3, 0), (4, 1)], {})
    assert source.name(0) == f"{tmp_path / 'train.tar'}: a/0.png"
    _write(tmp_path / "val" / "a.tar", {"./0.png": picture(1)})
    for name in ("._a.tar", ".a.tar", "__MACOSX/._a.tar", ".DS_Store"):
        (tmp_path / "val" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "val" / name).write_bytes(b"twin")
    assert TarSource(tmp_path, "val").left_out.as_dict() == {}


def test_files_beside_the_tars_are_told(tmp_path: Path) -> None:
    _write(tmp_path / "train" / "a.tar", {"0.png": picture(1), "deep.tar": b""})
    for name in ("b.tar.gz", "c.tgz", "more/d.tar", "more/e.png"):
        (tmp_path / "train" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / name).touch()
    with pytest.raises(UserError, match=r"a\.tar cannot be read as an uncompressed tar file: deep\.tar inside it: "):
        TarSource(tmp_path, "train")
    _write(tmp_path / "train" / "a.tar", {"0.png": picture(1)})
    assert TarSource(tmp_path, "train").left_out.as_dict() == {".gz": 1, ".png": 1, ".tar": 1, ".tgz": 1}


def test_one_tar_and_a_folder_of_tars(tmp_path: Path) -> None:
    _write(tmp_path / "train.tar", {"a/0.png": picture(1)})
    _write(tmp_path / "train" / "._a.tar", {"0.png": picture(1)})
    assert len(TarSource(tmp_path, "train")) == 1
    _write(tmp_path / "train" / "a.tar", {"0.png": picture(1)})
    with pytest.raises(
        UserError, match=r"both .*train\.tar and .*train/a\.tar are there; expected one tar, or a folder"
    ):
        TarSource(tmp_path, "train")


def test_a_tar_without_images(tmp_path: Path) -> None:
    """It would be missing from the classes, and all others would move up."""
    outer = {name: tmp_path / "train" / name for name in ("ant.tar", "bee.tar")}
    _write(outer["ant.tar"], {"0.heic": b"", "1.heic": b"", "notes.txt": b""})
    _write(outer["bee.tar"], {"0.png": picture(1)})
    with pytest.raises(UserError, match=r"train/ant\.tar holds no images; left out: 2 \.heic, 1 \.txt"):
        TarSource(tmp_path, "train")
    _write(tmp_path / "val.tar", {name: path.read_bytes() for name, path in outer.items()})
    with pytest.raises(UserError, match=r"val\.tar: ant\.tar holds no images; left out: 2 \.heic, 1 \.txt"):
        TarSource(tmp_path, "val")
    _write(outer["ant.tar"], {})
    with pytest.raises(UserError, match=r"ant\.tar holds no images; left out: no files"):
        TarSource(tmp_path, "train")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("x/a/0.png", "y/a/1.png"), "the images of x/a and of y/a would be one class, a; expected a name for every"),
        (("a/0.png", "train/a/1.png"), "the images of a and of train/a would be one class, a"),
        (("a/0.png", "a/more/1.png"), "holds images in its folder a and in a/more; expected a folder for every class"),
        (("a/0.png", "preview.png"), "holds images outside of folders and in a; expected a folder for every class"),
        (("a/0.png", "./a/0.png"), r"train\.tar: a/0\.png is in it twice; expected every name once \(tar --append"),
    ],
)
def test_images_whose_class_or_content_can_be_one_of_two(tmp_path: Path, names: tuple[str, ...], words: str) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for number, name in enumerate((*names, "z/0.png")):
            add(tar, name, picture(number))
    with pytest.raises(UserError, match=words):
        TarSource(tmp_path, "train")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("x/a.tar", "y/a.tar"), r"the images of x/a\.tar and of y/a\.tar would be one class, a"),
        (("a.tar", "a/1.png"), r"the images of a and of a\.tar would be one class, a"),
        (("a.tar", "1.png"), r"holds images outside of folders and in a\.tar"),
        (("x/a.tar", "x/1.png"), r"holds images in its folder x and in x/a\.tar"),
    ],
)
def test_inner_tars_whose_class_can_be_one_of_two(tmp_path: Path, names: tuple[str, ...], words: str) -> None:
    _write(tmp_path / "inner.tar", {"0.png": picture(1)})
    inner = (tmp_path / "inner.tar").read_bytes()
    _write(tmp_path / "train.tar", {name: inner if name.endswith(".tar") else picture(2) for name in names})
    with pytest.raises(UserError, match=words):
        TarSource(tmp_path, "train")


def test_an_inner_tar_with_images_in_and_out_of_folders(tmp_path: Path) -> None:
    _write(tmp_path / "inner.tar", {"0.png": picture(1), "more/0.png": picture(1)})
    _write(tmp_path / "train.tar", {"x/a.tar": (tmp_path / "inner.tar").read_bytes()})
    with pytest.raises(UserError, match=r"train\.tar: x/a\.tar holds images outside of folders and in more"):
        TarSource(tmp_path, "train")


def test_a_data_set_that_is_divided_among_tars(tmp_path: Path) -> None:
    for number, name in enumerate(("part0", "part1")):
        _write(tmp_path / "train" / f"{name}.tar", {f"{name}/{label}/0.png": picture(number) for label in ("a", "b")})
    expected = [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert _reds(TarSource(tmp_path, "train")) == expected
    outer = {f"{path.stem}/images.tar": path.read_bytes() for path in sorted((tmp_path / "train").iterdir())}
    _write(tmp_path / "val.tar", outer)  # inner tars of one name, whose folders are the classes
    assert sorted(_reds(TarSource(tmp_path, "val"))) == expected
