"""segmentation_models_pytorch's decoders on our backbones."""

from typing import Any

import pytest
import torch
from dense_networks import NARROW, pyramid, segmenter, vit

from dge_recipes.dense import likeliest
from dge_recipes.errors import UserError

smp = pytest.importorskip("segmentation_models_pytorch")


@pytest.mark.parametrize(
    ("kind", "theirs", "options"),
    [
        ("semantic_fpn", "FPN", {"decoder_pyramid_channels": 64, "decoder_segmentation_channels": 32}),
        ("upernet", "UPerNet", {"decoder_channels": 64}),
    ],
)
def test_it_is_the_librarys_own_network(kind: str, theirs: str, options: dict[str, int]) -> None:
    model = segmenter(kind).eval()
    network = getattr(smp, theirs)("tu-pvt_dge_s124_tiny_256", encoder_weights=None, classes=3, **NARROW, **options)
    network.load_state_dict({key.replace("encoder.model.", "encoder.model."): value for key, value in _keys(model)})
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(images), network.eval()(images))


def _keys(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return list(model.state_dict().items())


@pytest.mark.parametrize("kind", ["semantic_fpn", "upernet"])
@pytest.mark.parametrize("backbone", [pyramid, vit])
def test_every_pixel_of_an_odd_image_gets_logits(kind: str, backbone: Any) -> None:
    model = segmenter(kind, backbone())
    logits = model(torch.randn(2, 3, 50, 77))
    assert logits.shape == (2, 3, 50, 77)
    logits.square().mean().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_masks_of_the_sizes_wanted() -> None:
    model = segmenter().eval()
    images = [torch.randn(3, 64, 64), torch.randn(3, 40, 70)]
    with torch.no_grad():
        every = [model(image.unsqueeze(0)) for image in images]
    logits = every[0]
    own = [likeliest(each[0], each.shape[2:]) for each in every]
    assert [tuple(mask.shape) for mask in own] == [(64, 64), (40, 70)]
    assert torch.equal(own[0], logits[0].argmax(0))
    sized = [likeliest(each[0], size) for each, size in zip(every, [(128, 128), (40, 70)], strict=True)]
    expected = torch.nn.functional.interpolate(logits, size=(128, 128), mode="bilinear")[0].argmax(0)
    assert torch.equal(sized[0], expected)
    assert torch.equal(sized[1], own[1])


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ({"kind": "retinanet"}, "head.kind: got retinanet, expected one of semantic_fpn, upernet for segmentation"),
        ({"strides": (8, 16)}, r"head.strides: got \[8, 16\], expected four"),
        ({"channels": 96}, "head.channels: got 96, expected a multiple of 64 for semantic_fpn"),
    ],
)
def test_heads_that_do_not_fit(head: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        segmenter(**head)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch.base", None)
    with pytest.raises(UserError, match=r'needs segmentation_models_pytorch .*pip install "dge-recipes\[dense\]"'):
        segmenter()
