"""The list of keys."""

from dge_recipes.config.wording import list_keys


def test_every_key_is_listed_once_with_its_meaning() -> None:
    keys = list_keys()
    names = [name for name, _, _ in keys]
    assert len(names) == len(set(names))
    assert {"model.name", "data.shift", "data.root", "optim.lr", "output.dir"} <= set(names)
    defaults = {name: default for name, default, _ in keys}
    assert (defaults["optim.lr"], defaults["optim.clip_grad"], defaults["train.seed"]) == ("required", "null", "0")
    # A data set's name is the choice among them and explains itself.
    assert all(meaning for name, _, meaning in keys if name != "data.name")
