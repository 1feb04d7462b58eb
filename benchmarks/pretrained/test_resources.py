"""Photographs come out of resource files as they went in."""

import io
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.pretrained.resources import unpack_photographs


def _webp(side: int, mode: str) -> bytes:
    content = io.BytesIO()
    Image.effect_noise((side, side), 50).convert(mode).save(content, "WEBP", lossless=mode == "RGBA")
    return content.getvalue()


def test_opaque_pictures_alone(tmp_path: Path) -> None:
    first, second = _webp(130, "RGB"), _webp(140, "RGB")
    drawn = Image.new("RGBA", (150, 150), (1, 2, 3, 4))
    alpha = io.BytesIO()
    drawn.save(alpha, "WEBP")
    file = tmp_path / "animals.rcc"
    cut = b"RIFF\xff\xff\x00\x00WEBPVP8 and no more"
    file.write_bytes(b"qres\0RIFF" + first + b"x" + _webp(64, "RGB") + alpha.getvalue() + second + cut)
    folder = tmp_path / "pictures"
    unpack_photographs([file], folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "animals_000.webp": first,
        "animals_003.webp": second,
    }


def test_nothing_is_half_there(tmp_path: Path) -> None:
    good = tmp_path / "good.rcc"
    good.write_bytes(_webp(130, "RGB"))
    folder = tmp_path / "pictures"
    with pytest.raises(FileNotFoundError):
        unpack_photographs([good, tmp_path / "missing.rcc"], folder)
    assert not folder.exists()
    unpack_photographs([good], folder)
    assert len(list(folder.iterdir())) == 1
