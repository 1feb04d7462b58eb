from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from small_models import SMALL, Build, scatter_routing
from timm.layers import set_fused_attn
from timm.models import create_feature_extractor, group_parameters
from torch import Tensor

from dge_models import deterministic_routing, set_training_mode
from dge_models.encoder import DGEBlock
from dge_models.router import gumbel_noise
from dge_models.vit import routed_blocks

DISTILLED = "deit_dge_s124_tiny_distilled_patch16_256"
NO_CLASS = {"class_token": False, "global_pool": "avg"}


@pytest.mark.parametrize("name", ["deit_dge_s124_tiny_patch16_256", DISTILLED])
@pytest.mark.parametrize("size", [32, (28, 28), (20, 36)])
@pytest.mark.parametrize("mode", ["dense", "sparse", "eval"])
def test_any_grid_forwards_and_backwards(small: Build, name: str, size: Any, mode: str) -> None:
    model = small(name, img_size=size)
    if mode != "eval":
        set_training_mode(model.train(), mode)
    height, width = (size, size) if isinstance(size, int) else size
    logits, routings = model.forward_routed(torch.randn(2, 3, height, width))
    assert logits.shape == (2, 7)
    assert [routing.choice.shape for routing in routings] == [(2, -(-height // 16), -(-width // 16))] * 3
    (logits.square().sum() + sum(routing.queries.sum() for routing in routings)).backward()
    missing = [parameter for parameter, value in model.named_parameters() if value.grad is None]
    assert missing == []


def test_evaluation_is_the_same_with_and_without_gradients(small: Build) -> None:
    model, images = small(), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        fast = model(images)
    torch.testing.assert_close(model(images), fast, atol=1e-5, rtol=0)


def test_training_modes_agree_for_given_noise(small: Build) -> None:
    model, images = small().train(), torch.randn(4, 3, 32, 32)
    noise = [gumbel_noise((4, 2, 2, 3), images.device) for _ in range(3)]
    outputs, gradients = [], []
    for mode in ("dense", "sparse"):
        set_training_mode(model, mode)
        model.zero_grad()
        logits, routings = model.forward_routed(images, noise=noise)
        torch.nn.functional.cross_entropy(logits, torch.arange(4)).backward()
        outputs.append((logits.detach(), [routing.choice for routing in routings]))
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    torch.testing.assert_close(outputs[0][0], outputs[1][0], atol=1e-5, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(outputs[0][1], outputs[1][1], strict=True))
    # The routers' gradients differ by design, and reach what lies before them; the last block and the head
    # lie behind every router.
    for name, value in gradients[0].items():
        if name.startswith(("head.", "norm.", "blocks.2.")) and "router" not in name:
            torch.testing.assert_close(value, gradients[1][name], atol=1e-5, rtol=1e-3)


def test_deterministic_training_equals_evaluation(small: Build) -> None:
    model, images = small(), torch.randn(4, 3, 32, 32)
    expected = model(images)
    with deterministic_routing():
        torch.testing.assert_close(model.train()(images), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(images), model(images))


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_gradient_checkpointing_changes_nothing(small: Build, mode: str) -> None:
    model, images = small(layers=[0, 2]).train(), torch.randn(4, 3, 32, 32)
    set_training_mode(model, mode)
    results = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        torch.manual_seed(3)
        logits, routings = model.forward_routed(images)
        (logits.square().sum() + routings[0].queries.sum()).backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_layers_choose_the_blocks_that_route(small: Build) -> None:
    model = small(layers=[0, -1])
    assert [type(block) is DGEBlock for block in model.blocks] == [True, False, True]
    assert len(model.forward_routed(torch.randn(1, 3, 32, 32))[1]) == 2
    assert small(layers=[]).forward_routed(torch.randn(1, 3, 32, 32))[1] == []


@pytest.mark.parametrize("kwargs", [{}, NO_CLASS, {"reg_tokens": 2, "no_embed_class": True}])
def test_intermediates_agree_with_features(small: Build, kwargs: dict[str, Any]) -> None:
    model, images = small(**kwargs), torch.randn(2, 3, 32, 32)
    features, maps = model.forward_intermediates(images, norm=True)
    torch.testing.assert_close(features, model.forward_features(images))
    spatial = features[:, model.num_prefix_tokens :].transpose(1, 2).reshape(2, 32, 8, 8)
    torch.testing.assert_close(maps[-1], spatial)
    assert len(maps) == 3
    early = model.forward_intermediates(images, indices=[1], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early[0], model.forward_intermediates(images)[1][1])


def test_intermediates_in_every_form(small: Build) -> None:
    model, images = small(), torch.randn(2, 3, 20, 32)
    model.set_input_size((20, 32))
    flat = model.forward_intermediates(images, indices=2, output_fmt="NLC", intermediates_only=True)
    assert [part.shape for part in flat] == [(2, 40, 32)] * 2
    pairs = model.forward_intermediates(images, return_prefix_tokens=True, intermediates_only=True)
    assert [part.shape for part in pairs[0]] == [(2, 32, 5, 8), (2, 1, 32)]
    named = model.forward_intermediates(images, output_dict=True, return_prefix_tokens=True)
    assert set(named) == {"image_intermediates", "image_intermediates_prefix", "image_features"}
    assert model.get_intermediate_layers(images, 1)[0].shape == (2, 40, 32)
    with pytest.raises(ValueError, match="output_fmt: got 'NHWC'"):
        model.forward_intermediates(images, output_fmt="NHWC")


def test_features_only() -> None:
    model = timm.create_model("deit_dge_s124_tiny_patch16_256", features_only=True, out_indices=(0, 2), **SMALL)
    maps = model.eval()(torch.randn(2, 3, 32, 32))
    assert [part.shape for part in maps] == [(2, 32, 8, 8)] * 2
    assert model.feature_info.reduction() == [4, 4]


@pytest.mark.parametrize("name", ["deit_dge_s124_tiny_patch16_256", DISTILLED])
def test_reset_classifier(small: Build, name: str) -> None:
    model = small(name)
    model.reset_classifier(3)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    model.reset_classifier(0)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 32)


@pytest.mark.parametrize("size", [(28, 28), (20, 44), (4, 4)])
def test_set_input_size_and_dynamic_size_agree(small: Build, size: tuple[int, int]) -> None:
    model = small()
    dynamic = small(dynamic_img_size=True)
    dynamic.load_state_dict(model.state_dict())
    model.set_input_size(size)
    images = torch.randn(2, 3, *size)
    logits, routings = dynamic.forward_routed(images)
    torch.testing.assert_close(model(images), logits)
    assert routings[0].grid == (size[0] // 4, size[1] // 4)


def test_padded_input_has_the_padded_grid(small: Build) -> None:
    model = small(dynamic_img_size=True, dynamic_img_pad=True)
    assert model.forward_routed(torch.randn(1, 3, 30, 33))[1][0].grid == (8, 9)


def test_distilled_model_averages_its_heads_and_splits_them_in_distilled_training(small: Build) -> None:
    model, images = small(DISTILLED), torch.randn(2, 3, 32, 32)
    model.set_distilled_training(True)
    tokens = model.forward_features(images)
    expected = (model.head(tokens[:, 0]) + model.head_dist(tokens[:, 1])) / 2
    torch.testing.assert_close(model(images), expected)
    (plain, distilled), routings = model.train().forward_routed(images)
    assert plain.shape == distilled.shape == (2, 7)
    assert routings[0].num_prefix_tokens == 2


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_after_a_training_step(small: Build, clone: Callable[[Any], Any]) -> None:
    model, images = small().train(), torch.randn(2, 3, 32, 32)
    model(images).sum().backward()
    torch.optim.SGD(model.parameters(), 0.01).step()
    copied = clone(model)
    assert torch.equal(copied.eval()(images), model.eval()(images))
    copied.load_state_dict(model.state_dict())


def test_weights_survive_a_local_directory(small: Build, tmp_path: Path) -> None:
    from timm.models import save_for_hf

    model, images = small(), torch.randn(2, 3, 32, 32)
    save_for_hf(model, tmp_path, model_args={**SMALL, "splits": (4, 2, 1)})
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded(images), model(images))


def test_autocast(small: Build) -> None:
    model, images = small(), torch.randn(4, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits, routings = model.forward_routed(images)
    torch.testing.assert_close(logits.float(), model(images), atol=0.15, rtol=0.1)
    assert routings[0].gate.dtype == torch.float32
    for mode in ("dense", "sparse"):
        set_training_mode(model.train(), mode)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(images).float().square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_model_in_bfloat16_runs(small: Build) -> None:
    model = small().bfloat16()
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["dense", "sparse", "eval"])
def test_an_empty_batch_gives_empty_logits(small: Build, mode: str) -> None:
    model = small()
    if mode != "eval":
        set_training_mode(model.train(), mode)
    assert model(torch.randn(0, 3, 32, 32)).shape == (0, 7)
    with torch.no_grad():
        assert model(torch.randn(0, 3, 32, 32)).shape == (0, 7)


def test_an_image_does_not_see_the_others(small: Build) -> None:
    model, images = small(), torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        together = model(images)
        alone = torch.cat([model(image.unsqueeze(0)) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


def test_routings_come_out_of_wrappers_that_know_forward_alone(small: Build) -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

    model, images = small(), torch.randn(2, 3, 32, 32)
    logits, routings = Wrapper(model)(images, return_routing=True)
    assert torch.equal(logits, model(images))
    assert len(routings) == 3


def test_parameter_groups_and_decay_are_timms(small: Build) -> None:
    model = small()
    assert {"pos_embed", "cls_token", "dist_token"} <= model.no_weight_decay()
    groups = group_parameters(model, model.group_matcher())
    blocks = [names for names in groups.values() if any("router" in name for name in names)]
    assert len(blocks) == 3


def test_reinitialising_keeps_the_routers_bias(small: Build) -> None:
    model = small()
    model.init_weights()
    for block in routed_blocks(model):
        torch.testing.assert_close(block.router.gate.bias.softmax(0)[0], torch.tensor(0.95))


def test_weights_do_not_depend_on_fused_attention(small: Build) -> None:
    set_fused_attn(False)
    try:
        slow = small()
    finally:
        set_fused_attn(True)
    fast, images = small(), torch.randn(2, 3, 32, 32)
    fast.load_state_dict(slow.state_dict())
    torch.testing.assert_close(slow(images), fast(images))


def test_graph_feature_extraction(small: Build) -> None:
    model, images = small(), torch.randn(2, 3, 32, 32)
    extractor = create_feature_extractor(model, ["norm"])
    torch.testing.assert_close(extractor(images)["norm"], model.forward_features(images))


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"training_mode": "slow"}, "training_mode: got 'slow'"),
        ({"drop_path_mode": "batch"}, "drop_path_mode: got 'batch'"),
        ({"splits": (6, 4)}, r"splits: got \(6, 4\)"),
        ({"layers": [3]}, r"layers: got \[3\]; expected indices of the model's 3 blocks"),
        ({"layers": [0, -3]}, r"layers: got \[0, 0\]; expected each block at most once"),
        ({"patch_drop_rate": 0.5}, "patch_drop_rate"),
        ({"attn_drop_rate": 0.1}, r"blocks\.0\.attn: attention dropout is 0\.1"),
        ({"img_size": 3}, r"img_size: got \(3, 3\); expected at least one patch of \(4, 4\)"),
    ],
)
def test_bad_options_are_refused(kwargs: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        timm.create_model("deit_dge_s124_tiny_patch16_256", **{**SMALL, **kwargs})


def test_bad_input_is_refused(small: Build) -> None:
    model = small(dynamic_img_size=True)
    with pytest.raises(ValueError, match=r"images: got shape \(3, 32, 32\); expected \[B, C, H, W\]"):
        model(torch.randn(3, 32, 32))
    with pytest.raises(ValueError, match="images: got 3 × 32 pixels"):
        model(torch.randn(1, 3, 3, 32))
    with pytest.raises(ValueError, match="noise: got 1 tensors; expected one per routed block, 3"):
        model.train()(torch.randn(1, 3, 32, 32), noise=[torch.zeros(1, 2, 2, 3)])
    for mask in ({"attn_mask": torch.ones(65, 65)}, {"is_causal": True}):
        with pytest.raises(ValueError, match="attn_mask, is_causal"):
            model(torch.randn(1, 3, 32, 32), **mask)


def test_scattered_routers_use_every_split(small: Build) -> None:
    routings: list[Any] = small().forward_routed(torch.randn(8, 3, 32, 32))[1]
    chosen: Tensor = torch.cat([routing.choice.flatten() for routing in routings])
    assert len(chosen.unique()) == 3
    assert scatter_routing(small()) is not None
