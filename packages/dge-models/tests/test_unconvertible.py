from __future__ import annotations

import timm
import torch
from torch import nn

from dge_models.unconvertible import reason_against


def test_nothing_stands_against_plain_models() -> None:
    with torch.device("meta"):
        for name in ("deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_base_patch16_siglip_224"):
            assert reason_against(timm.create_model(name, depth=1)) is None


def test_unknown_classes_and_ours_are_named() -> None:
    assert reason_against(nn.Linear(1, 1)) == (
        "got Linear; expected timm's VisionTransformer, VisionTransformerDistilled or Eva, other classes have blocks "
        "of their own"
    )
    with torch.device("meta"):
        pyramid = timm.create_model("pvt_tiny_256")
    assert str(reason_against(pyramid)).endswith("the routed one is created by name, as pvt_dge_s124_small_256")


def test_blocks_are_named_by_their_place() -> None:
    with torch.device("meta"):
        parallel = timm.create_model("vit_small_patch16_18x2_224", depth=2)
        model = timm.create_model("deit_tiny_patch16_224", depth=2)
    model.blocks[1] = parallel.blocks[0]
    assert str(reason_against(model)).startswith("blocks.1 is a ParallelThingsBlock; expected timm's Block: it has")
