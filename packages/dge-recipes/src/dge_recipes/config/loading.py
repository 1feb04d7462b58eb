"""From a YAML file and ``key=value`` overrides to a checked :class:`Config`, and back."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dge_recipes.config.files import config_path
from dge_recipes.config.schema import Config
from dge_recipes.config.wording import describe
from dge_recipes.config.yaml_values import parse_yaml
from dge_recipes.errors import UserError

__all__ = ["build_config", "dump_config", "load_config"]


def load_config(name_or_file: str, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply overrides.

    Args:
        name_or_file: a shipped recipe's name or the path of a YAML file.
        overrides: ``section.key=value`` each; the value is read as YAML. Later ones win.

    Returns:
        The checked, immutable configuration.

    Raises:
        UserError: no such recipe, unreadable YAML, an unknown key or a value of another type; every
            fault is named, with its dotted key.
    """
    path = config_path(name_or_file)
    tree = parse_yaml(_read(path), str(path))
    if not isinstance(tree, dict):
        raise UserError(f"config {path} must be a mapping of sections, got {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    return build_config(tree)


def build_config(tree: Mapping[str, Any]) -> Config:
    """Check a nested mapping against the schema.

    Raises:
        UserError: unknown keys, missing keys or wrong types, all of them in one line.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(describe(error)) from error


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; :func:`load_config` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} cannot be read: {error}") from error


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one dotted key in place."""
    key, equals, text = override.partition("=")
    path = key.split(".")
    if not equals or not all(path):
        raise UserError(f"override {override!r} is not of the form section.key=value")
    *sections, leaf = path
    _section(tree, sections)[leaf] = parse_yaml(text, f"the value in override {override!r}")


def _section(tree: dict[str, Any], path: Iterable[str]) -> dict[str, Any]:
    walked: list[str] = []
    for name in path:
        walked.append(name)
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise UserError(f"key {'.'.join(walked)!r} holds {tree!r}, not a section, so nothing can be set inside it")
    return tree
