"""The YAML files that the package ships: recipes in ``configs``, Accelerate's in ``launchers``."""

from difflib import get_close_matches
from pathlib import Path

from dge_recipes.errors import UserError

__all__ = ["config_path", "first_comment", "launcher_path", "list_configs", "list_launchers"]

_PACKAGE = Path(__file__).resolve().parent.parent


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
