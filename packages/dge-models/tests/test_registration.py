"""What the registered models share."""

import timm
from timm.models.vision_transformer import VisionTransformer

from dge_models import dge_deit, dge_dpvt, dge_pvt
from dge_models.dge_deit import checkpoint_filter_fn
from dge_models.registration import create, data_config

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def test_a_family_changes_what_it_has_otherwise() -> None:
    config = data_config("stem.conv", crop_pct=0.9)
    assert (config["first_conv"], config["crop_pct"], config["input_size"]) == ("stem.conv", 0.9, (3, 256, 256))
    assert data_config("stem.conv")["crop_pct"] == 0.875


def test_features_are_those_asked_for_and_the_callers_settings_stay() -> None:
    settings = {**SMALL, "features_only": True, "out_indices": (0, 1)}
    before = dict(settings)
    extractor = create(VisionTransformer, "deit_tiny_patch16_256", False, checkpoint_filter_fn, 1, settings)
    assert extractor.feature_info.channels() == [16, 16]
    assert settings == before
    last = create(
        VisionTransformer, "deit_tiny_patch16_256", False, checkpoint_filter_fn, (1,), {**SMALL, "features_only": True}
    )
    assert last.feature_info.channels() == [16]


def test_the_references_names_are_loaded() -> None:
    model = create(VisionTransformer, "deit_tiny_patch16_256", False, checkpoint_filter_fn, 1, SMALL)
    weights = {}
    for name, value in model.state_dict().items():
        if ".attn.qkv." in name:  # queries apart from keys and values, as the reference has them
            weights[name.replace("qkv", "q")], weights[name.replace("qkv", "kv")] = value[:16], value[16:] + 1
        else:
            weights[name] = value
    expected = model.blocks[1].attn.qkv.weight[16:] + 1
    model.load_state_dict(weights)
    assert model.blocks[1].attn.qkv.weight[16:].equal(expected)


def test_every_name_is_a_function_of_its_module() -> None:
    for module, count in ((dge_deit, 9), (dge_dpvt, 8), (dge_pvt, 8)):
        names = timm.list_models(module=[module.__name__.rpartition(".")[2]])
        assert len(names) == count == len(set(names) & set(module.__all__))
        for name in names:
            entry = getattr(module, name)
            assert (entry.__name__, entry.__module__) == (name, module.__name__)
    assert dge_pvt.pvt_dge_s124_tiny_256.__doc__ == (  # type: ignore[attr-defined]
        "PVT-Tiny, depths (2, 2, 2, 2): with Dynamic Grained Encoder blocks."
    )
