"""One line for what is wrong with a configuration, and the list of keys that exist."""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from dge_recipes.config.schema import Config
from dge_recipes.data.registry import DATA_SETS

__all__ = ["describe", "list_keys"]


# Pydantic speaks of Python, recipes of YAML.
_WORDS = {
    "Input should be": "expected",
    "valid dictionary or instance of": "section",
    "valid dictionary": "mapping, for example {a: 1}",
    "valid tuple": "list, for example [a, b]",
    "a valid boolean": "true or false",
    "Tuple should have": "expected",
    " after validation": "",
}


def describe(error: ValidationError) -> str:
    """All faults of a configuration in one line, each with its dotted key."""
    faults: list[str] = []
    for fault in error.errors(include_url=False):
        for text in _fault(fault):
            if text not in faults:
                faults.append(text)
    return "; ".join(faults)


def list_keys() -> list[tuple[str, str, str]]:
    """Every key that exists: (dotted key, default or ``required``, what it means)."""
    fields: dict[str, list[FieldInfo]] = {}
    for key, field in _fields():
        fields.setdefault(key, []).append(field)
    return [(key, _defaults(same), _meaning(key, same[0])) for key, same in fields.items()]


def _fault(fault: ErrorDetails) -> list[str]:
    key, value, kind = _dotted(fault["loc"]), fault["input"], fault["type"]
    if kind == "extra_forbidden":
        return [_unknown(leaf) for leaf in _leaves(key, value)]
    if kind == "missing" and isinstance(fault["loc"][-1], int):
        return [f"wrong value for {key.rpartition('.')[0]!r}: got {value!r}, expected more values"]
    if kind == "missing":
        return [f"missing key: {key!r}"]
    if kind in {"union_tag_invalid", "union_tag_not_found"}:
        got = value.get("name") if isinstance(value, dict) else value
        return [f"wrong value for '{key}.name': got {got!r}, expected one of {', '.join(DATA_SETS)}"]
    if kind == "value_error":  # keys that do not go together
        return [str(fault["ctx"]["error"])]
    expected = fault["msg"]
    for said, meant in _WORDS.items():
        expected = expected.replace(said, meant)
    return [f"wrong value for {key!r}: got {value!r} ({type(value).__name__}), {expected}"]


def _unknown(key: str) -> str:
    known = [name for name, _ in _fields()]
    if key in known:  # of another kind of data set than the recipe's
        return f"unknown key: {key!r} (it belongs to another data.name)"
    close = get_close_matches(key, known, n=1, cutoff=0.6)
    return f"unknown key: {key!r}" + (f" (did you mean {close[0]!r}?)" if close else "")


def _leaves(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    else:
        yield key


def _dotted(location: tuple[int | str, ...]) -> str:
    """Pydantic's location without the data set's name that it puts between ``data`` and the key."""
    parts = list(location)
    if parts[:1] == ["data"] and len(parts) > 1 and parts[1] in DATA_SETS:
        del parts[1]
    return ".".join(str(part) for part in parts)


def _fields() -> Iterator[tuple[str, FieldInfo]]:
    """Every key with its field; those that kinds of data sets share come once for each."""
    for section, outer in Config.model_fields.items():
        kinds = get_args(outer.annotation) or (outer.annotation,)
        models = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not models:  # a key outside of the sections
            yield section, outer
        for model in models:
            for name, field in model.model_fields.items():
                yield f"{section}.{name}", field


def _meaning(key: str, field: FieldInfo) -> str:
    """What a key's field says of itself, and the values to choose from where it does not name them."""
    if key == "data.name":
        return f"kind of data set: {', '.join(DATA_SETS)}"
    said = field.description or ""
    choices = [str(choice) for choice in get_args(field.annotation)] if get_origin(field.annotation) is Literal else []
    return said if all(choice in said for choice in choices) else f"{said}; one of {', '.join(choices)}"


def _defaults(fields: list[FieldInfo]) -> str:
    """The default; kinds of data sets may have different ones for a key that they share."""
    different = list(dict.fromkeys(_default(field) for field in fields))
    return different[0] if len(different) == 1 else f"{' or '.join(different)}, by data.name"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if default is None or default is PydanticUndefined:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    return str(list(default) if isinstance(default, tuple) else default)  # as YAML has it
