"""Crops to learn from: every picture in turn, fixed by a seed."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from small_models import draw_pictures

from dge_recipes.compress.crops import Crops, kept_side, read_crops, with_crops
from dge_recipes.compress.pictures import pictures_section
from dge_recipes.errors import UserError

_VIEW = {"image_size": 32, "crop_pct": 1.0, "mean": (0.0,) * 3, "std": (1.0,) * 3}


def test_every_picture_comes_once_before_any_comes_again(tmp_path: Path) -> None:
    section = pictures_section(tmp_path, _VIEW, ())
    pictures = [Image.new("RGB", (60, 50), (20 * number, 0, 0)) for number in range(10)]
    crops = Crops(pictures, section, seed=1)
    reds = torch.cat([crops.batch(number, 4) for number in range(5)])[:, 0].mean((1, 2)).mul(255 / 20).round()
    assert sorted(reds[:10].tolist()) == sorted(reds[10:].tolist()) == list(range(10))
    assert reds[:10].tolist() != reds[10:].tolist()


def test_a_seed_fixes_them_and_nothing_else_is_disturbed(tmp_path: Path) -> None:
    section = pictures_section(draw_pictures(tmp_path, 6), _VIEW, ())
    crops = read_crops(section.open("train"), section, seed=1)
    state = torch.get_rng_state()
    batch = crops.batch(3, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert batch.shape == (4, 3, 32, 32)
    assert torch.equal(read_crops(section.open("train"), section, seed=1).batch(3, 4), batch)
    assert not torch.equal(read_crops(section.open("train"), section, seed=2).batch(3, 4), batch)


def test_pictures_are_kept_small(tmp_path: Path) -> None:
    Image.new("RGB", (400, 200)).save(tmp_path / "large.png")
    Image.new("RGB", (30, 20)).save(tmp_path / "small.png")
    Image.new("RGB", (30, 20)).save(tmp_path / "more.png")
    section = pictures_section(tmp_path, _VIEW, ("data.held_out=0.1",))
    source = section.open("train")
    crops = read_crops(source, section, seed=0)
    sizes = {Path(source.name(index)).stem: crops._pictures[index].size for index in range(len(source))}
    expected = {"large": (320, 160), "small": (30, 20), "more": (30, 20)}
    assert sizes == {name: expected[name] for name in sizes}
    assert len(sizes) == 2


def test_few_pictures_are_kept_larger_than_many() -> None:
    assert [kept_side(count, 224) for count in (1, 46, 200, 100_000)] == [1120, 1120, 653, 336]


def test_varied_crops_show_smaller_parts_and_other_colours(tmp_path: Path) -> None:
    Image.linear_gradient("L").convert("RGB").resize((320, 320)).save(tmp_path / "grey.png")
    Image.new("RGB", (320, 320)).save(tmp_path / "black.png")
    section = pictures_section(tmp_path, _VIEW, ("data.held_out=0.1",))
    picture = Image.linear_gradient("L").convert("RGB").resize((320, 320))
    tinted = Image.merge("RGB", (picture.getchannel(0), picture.getchannel(0), Image.new("L", (320, 320), 90)))
    crops = Crops([tinted], section, seed=1)
    plain, varied = crops.batch(0, 40), crops.varied().batch(0, 40)
    assert torch.equal(crops.batch(0, 40), plain)

    def least(batch: torch.Tensor) -> float:
        return float((batch[:, 0].amax((1, 2)) - batch[:, 0].amin((1, 2))).min())

    assert least(varied) < 0.7 * least(plain)
    assert float(plain[:, 2].std()) < 1e-6
    assert float(varied[:, 2].mean((1, 2)).std()) > 0.02
    chosen = pictures_section(tmp_path, _VIEW, ("data.held_out=0.1", "data.crop_scale=[1.0,1.0]"))
    whole = Crops([picture], chosen, seed=1).varied().batch(0, 20)
    assert float((whole[:, 0, -1] - whole[:, 0, 0]).abs().min()) > 0.3


def test_crops_make_up_for_missing_images(tmp_path: Path) -> None:
    section = pictures_section(draw_pictures(tmp_path, 6), _VIEW, ())
    crops = read_crops(section.open("train"), section, seed=1)
    batches = [torch.zeros(4, 3, 32, 32), torch.zeros(1, 3, 32, 32)]
    filled = with_crops(batches, crops, 12)
    assert [len(batch) for batch in filled] == [4, 1, 4, 3]
    assert filled[:2] == batches
    assert torch.equal(torch.cat(filled[2:]), torch.cat([crops.batch(0, 4), crops.batch(1, 4)])[:7])
    assert with_crops(batches, crops, 5) == batches


def test_unreadable_pictures(tmp_path: Path) -> None:
    draw_pictures(tmp_path, 20)
    section = pictures_section(tmp_path, _VIEW, ("data.unreadable=skip",))
    source = section.open("train")
    Path(source.name(0)).write_bytes(b"no picture")
    assert len(read_crops(source, section, seed=0)) == len(source) - 1
    strict = pictures_section(tmp_path, _VIEW, ())
    with pytest.raises(UserError, match=r"cannot be read as an image: .*set data.unreadable=skip"):
        read_crops(source, strict, seed=0)
