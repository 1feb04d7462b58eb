"""The shipped recipes of detection and segmentation: complete, built, and comparable with their dense twins."""

import pytest
import torch

from dge_recipes.config import Config, load_config
from dge_recipes.config.loading import first_comment, list_configs
from dge_recipes.dense import build_detector, build_segmenter, create_backbone, routed_backbone

_TASKS = {name: load_config(name).task for name in list_configs()}
_DENSE = {
    **{f"{head}_pvt_dge_{size}_{data}": f"{head}_pvt_{size}_{data}"
       for size in ("tiny", "small")
       for head, data in (("retinanet", "coco_1x"), ("mask_rcnn", "coco_1x"), ("semantic_fpn", "ade20k"))},
    "upernet_deit_dge_small_ade20k": "upernet_deit_small_ade20k",
    "scenes_detection": "scenes_detection_dense",
    "scenes_segmentation": "scenes_segmentation_dense",
}  # fmt: skip


def test_they_are_all_here() -> None:
    assert {name for name, task in _TASKS.items() if task in ("detection", "segmentation")} == {
        *_DENSE,
        *_DENSE.values(),
    }


@pytest.mark.parametrize("name", sorted({*_DENSE, *_DENSE.values()}))
def test_the_network_can_be_built(name: str) -> None:
    config = load_config(name)
    with torch.device("meta"):
        network = _build(config)
    assert (routed_backbone(network) is not None) == (name in _DENSE)
    assert config.output.dir == f"runs/{name}"


def _build(config: Config) -> torch.nn.Module:
    backbone = create_backbone(config.model, init=False)
    classes = int(config.data.num_classes or 0)
    if config.task == "detection":
        return build_detector(backbone, config.head, classes, config.data.image_size)
    return build_segmenter(backbone, config.head, classes)


@pytest.mark.parametrize("name", sorted(_DENSE))
def test_a_dense_twin_differs_in_the_backbone_alone(name: str) -> None:
    config, twin = load_config(name), load_config(_DENSE[name])
    for section in ("task", "head", "data", "optim", "schedule", "train", "eval"):
        assert getattr(config, section) == getattr(twin, section)
    assert config.model.kwargs == twin.model.kwargs


def test_what_nobody_ran_says_so() -> None:
    paths = list_configs()
    for name in {*_DENSE, *_DENSE.values()}:
        text = paths[name].read_text(encoding="utf-8")
        assert ("# Not run: nobody here has trained it." in text) == (not name.startswith("scenes"))
        assert first_comment(paths[name])
