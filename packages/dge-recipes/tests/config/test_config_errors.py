"""The list of keys."""

from dge_recipes.config.config_errors import list_keys


def test_every_key_is_listed_once_with_its_meaning() -> None:
    keys = list_keys()
    names = [name for name, _, _ in keys]
    assert len(names) == len(set(names))
    assert {"model.name", "data.shift", "data.root", "optim.lr", "output.dir"} <= set(names)
    defaults = {name: default for name, default, _ in keys}
    assert (defaults["optim.lr"], defaults["optim.clip_grad"], defaults["train.seed"]) == ("required", "null", "0")
    assert all(meaning for _, _, meaning in keys)


def test_defaults_and_choices_are_told_as_a_recipe_has_them() -> None:
    told = {name: (default, meaning) for name, default, meaning in list_keys()}
    assert told["data.image_size"][0] == "48 or 256 or 128 or 800 or 512, by data.name"
    assert told["train.checkpoint_activations"][0] == "false"
    assert told["data.mean"][0] == "[0.485, 0.456, 0.406]"
    assert told["data.interpolation"][1].endswith("; one of bilinear, bicubic, random")
    assert "huggingface" in told["data.name"][1]
    assert "one of" not in told["train.non_finite"][1]
