"""YAML as people expect it."""

import pytest

from dge_recipes.config.loading import parse_yaml
from dge_recipes.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("-2E5", -2e5),
        ("1.5e+2", 150.0),
        ("3", 3),
        ("1_000", 1000),
        ("null", None),
        ("true", True),
        ("[4, 2]", [4, 2]),
        ("e5", "e5"),
        ("a1e5", "a1e5"),
        ("'1e-3'", "1e-3"),
        ("", None),
    ],
)
def test_values(text: str, value: object) -> None:
    parsed = parse_yaml(text, "test")
    assert parsed == value
    assert type(parsed) is type(value)


def test_a_key_given_twice_is_an_error() -> None:
    with pytest.raises(UserError, match=r"test is not valid YAML.*'a' is given twice"):
        parse_yaml("a: 1\nb: 2\na: 3", "test")


def test_nothing_is_run() -> None:
    with pytest.raises(UserError, match="not valid YAML"):
        parse_yaml("!!python/object/apply:os.getcwd []", "test")
