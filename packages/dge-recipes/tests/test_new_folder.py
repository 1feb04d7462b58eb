"""A folder appears whole or not at all."""

from pathlib import Path

import pytest

from dge_recipes.errors import UserError
from dge_recipes.new_folder import check_new_folder, new_folder


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").touch()
    (tmp_path / "empty").mkdir()
    check_new_folder(tmp_path / "new")
    check_new_folder(tmp_path / "empty")
    for name in ("file", "full"):
        with pytest.raises(UserError, match=rf"--output \S+{name} exists; expected the name of a new folder"):
            check_new_folder(tmp_path / name)
        with pytest.raises(UserError, match="exists; expected"), new_folder(tmp_path / name):
            pass


@pytest.mark.parametrize("name", ["empty", "far/away"])
def test_it_is_renamed_at_the_end(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / name) as made:
        (made / "thing").write_text("x")
        assert not (tmp_path / name / "thing").exists()
    assert (tmp_path / name / "thing").read_text() == "x"
    assert [path.name for path in (tmp_path / name).parent.iterdir() if path.name.startswith(".")] == []


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyError), new_folder(tmp_path / "out") as made:
        (made / "thing").touch()
        raise KeyError
    with pytest.raises(UserError, match=r"cannot write \S+out: no room"), new_folder(tmp_path / "out"):
        raise OSError("no room")
    assert list(tmp_path.iterdir()) == []
