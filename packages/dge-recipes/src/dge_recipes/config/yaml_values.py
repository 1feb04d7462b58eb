"""YAML as people expect it: ``1e-3`` is a number and a key given twice is an error."""

import re
from collections.abc import Hashable
from typing import Any

import yaml

from dge_recipes.errors import UserError

__all__ = ["parse_yaml"]


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
