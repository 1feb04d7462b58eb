"""Which files of a folder ``dge-visualize`` draws, and what it says of the others."""

from pathlib import Path

import pytest

from dge_recipes.errors import UserError
from dge_recipes.visualize import find_images


def test_a_folder_gives_what_pillow_opens_and_tells_the_rest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    taken = ("B.JPG", "a.gif", "b.jfif", "c.webp", "d.Tif")
    for name in (*taken, "._a.gif", ".DS_Store", "e.heic", "f.HEIC", "g.txt", "more/h.png", "folder.png/i.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    named = tmp_path / "g.txt"  # whoever names a file means it
    assert find_images([str(tmp_path), str(named)]) == [*(tmp_path / name for name in taken), named]
    counts = "3 files were left out: 2 .heic, 1 .txt"
    assert caplog.messages == [f"{tmp_path}: {counts}; for example {tmp_path}/e.heic"]


def test_no_images(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match=f"no images in {tmp_path}"):
        find_images([str(tmp_path)])
    with pytest.raises(UserError, match="nowhere does not exist"):
        find_images([str(tmp_path / "nowhere")])
