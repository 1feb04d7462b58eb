"""Results of single images: together from all processes, each once, and too many unreadable ones end the run."""

from pathlib import Path

import pytest
from accelerate import Accelerator
from coco_folder import write_coco

from dge_recipes.config import CocoData
from dge_recipes.errors import UserError
from dge_recipes.evaluation.per_image import UNREAD, gather_images


def test_each_once_in_the_order_of_the_set(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    assert list(gather_images({2: "c", 0: "a", 1: UNREAD}, accelerator, 3).items()) == [(0, "a"), (2, "c")]
    others = {0: "a", 3: "d", 1: "b"}
    monkeypatch.setattr("dge_recipes.evaluation.per_image.gather_object", lambda own: [*own, *others.items()])
    assert list(gather_images({2: "c", 0: "a"}, accelerator, 4).values()) == ["a", "b", "c", "d"]


@pytest.mark.parametrize(("count", "met"), [(4, 3), (2, 3)])
def test_other_images_than_the_sets_are_a_fault_of_the_program(count: int, met: int) -> None:
    with pytest.raises(RuntimeError, match=f"evaluated {met} different images, but the data set has {count}"):
        gather_images(dict.fromkeys(range(met), "x"), Accelerator(cpu=True), count)


def test_too_many_unreadable_images_end_the_run(tmp_path: Path) -> None:
    write_coco(tmp_path, count=30)
    config = CocoData(name="coco", root=str(tmp_path), unreadable="skip", max_unreadable=0.4)
    images = config.detection_images("val", None, tmp_path).images
    accelerator = Accelerator(cpu=True)
    results = {place: UNREAD if place < 12 else "x" for place in range(30)}
    assert len(gather_images(results, accelerator, 30, images)) == 18
    with pytest.raises(UserError, match=r"13 of 30 images cannot be read, and data.max_unreadable=0.4 allows 12"):
        gather_images({**results, 12: UNREAD}, accelerator, 30, images)
    with pytest.raises(UserError, match="none of the 30 held-out images can be read"):
        gather_images(dict.fromkeys(range(30), UNREAD), accelerator, 30, images)
