"""Tar files: labels by folder or by tar, one order everywhere, reading from several processes at once."""

import os
import tarfile
from pathlib import Path

import pytest
from sample_images import add, picture

from dge_recipes.data.sources.tar import TarSource
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
