"""From a YAML file, shipped or a user's, and ``key=value`` overrides to a checked :class:`Config`, and back."""

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dge_recipes.config.config_errors import describe
from dge_recipes.config.schema import Config
from dge_recipes.config.task_keys import check_task, foreign_keys
from dge_recipes.errors import UserError

__all__ = ["build_config", "dump_config", "load_config", "parse_yaml"]
__all__ += ["config_path", "first_comment", "launcher_path", "list_configs", "list_launchers"]

_PACKAGE = Path(__file__).resolve().parent.parent


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
        UserError: unknown keys, missing keys or wrong types, all of them in one line; or keys of another task.
    """
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(describe(error)) from error
    check_task(config)
    return config


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, without what is no key of its task; :func:`load_config` reads it back."""
    tree = config.model_dump(mode="json", exclude=foreign_keys(config.task))
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)


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


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with numbers as in YAML 1.2 and without silently dropped keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML follows, wants a dot and a sign in the exponent and reads 1e-3 as text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML that holds plain values only (no tags, so nothing is run).

    Args:
        text: the YAML.
        source: what to call it in an error, for example a file's path.

    Raises:
        UserError: it is not valid YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error


def list_configs() -> dict[str, Path]:
    """Name and path of every shipped recipe, sorted by name."""
    return _yaml_files(_PACKAGE / "configs")


def list_launchers() -> dict[str, Path]:
    """Name and path of every shipped launcher config (for ``accelerate launch --config_file``), by name."""
    return _yaml_files(_PACKAGE / "launchers")


def config_path(name_or_file: str) -> Path:
    """The recipe called so, or the file at that path.

    Args:
        name_or_file: a name that ``dge-train --list`` shows, or the path of a YAML file.

    Raises:
        UserError: there is neither such a recipe nor such a file.
    """
    shipped = list_configs()
    if name_or_file in shipped:
        return shipped[name_or_file]
    path = Path(name_or_file)
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"config {name_or_file!r} is a folder; expected a YAML file, such as {path / 'config.yaml'}")
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        raise UserError(f"config file {name_or_file!r} does not exist")
    raise UserError(_unknown("config", name_or_file, shipped) + "; a path to a YAML file is accepted too")


def launcher_path(name: str) -> Path:
    """The shipped launcher config called so.

    Raises:
        UserError: there is none of that name.
    """
    shipped = list_launchers()
    if name not in shipped:
        raise UserError(_unknown("launcher", name, shipped))
    return shipped[name]


def first_comment(path: Path) -> str:
    """First line of the comment that heads a YAML file, without its ``#``; empty if there is none."""
    with path.open(encoding="utf-8") as file:
        line = file.readline()
    return line.lstrip("# ").strip() if line.startswith("#") else ""


def _yaml_files(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _unknown(what: str, name: str, known: dict[str, Path]) -> str:
    close = get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(known)}"
    return f"no {what} is called {name!r}: {hint}"
