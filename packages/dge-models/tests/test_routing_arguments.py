from __future__ import annotations

import timm
from small_models import SMALL, build_small

from dge_models import from_timm, set_fixed_queries
from dge_models.routing_arguments import ROUTING_ARGUMENTS, routing_arguments


def test_plain_models_have_none() -> None:
    assert routing_arguments(timm.create_model("resnet18")) == {}
    model = timm.create_model("deit_tiny_patch16_256", **SMALL)
    assert routing_arguments(model) == {}
    assert routing_arguments(from_timm(model, layers=[])) == {"layers": []}


def test_they_are_those_of_now() -> None:
    model = build_small(layers=[0, 2], training_mode="sparse", dynamic_img_size=True)
    expected = {
        "splits": [4, 2, 1],
        "trained_splits": [4, 2, 1],
        "layers": [0, 2],
        "training_mode": "sparse",
        "drop_path_mode": "query",
    }
    assert routing_arguments(model) == expected
    set_fixed_queries(model, [(1, 1, 2), (0, 2, 2)])
    assert routing_arguments(model) == {**expected, "fixed_counts": [[1, 1, 2], [0, 2, 2]]}
    set_fixed_queries(model, (1, 0, 1), image_size=(16, 32))
    assert routing_arguments(model) == {
        **expected,
        "fixed_counts": [[1, 0, 1]] * 2,
        "fixed_image_size": [16, 32],
    }
    assert routing_arguments(model).keys() <= set(ROUTING_ARGUMENTS)


def test_pyramids_have_no_layers() -> None:
    model = build_small("pvt_dge_s124_tiny_256")
    assert "layers" not in routing_arguments(model)
    set_fixed_queries(model, 0.5, image_size=(64, 96))
    assert routing_arguments(model)["fixed_image_size"] == [64, 96]
