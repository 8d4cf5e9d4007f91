"""YAML as a configuration is written: what is likely a slip is an error, and a number looks as everybody means it."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from fastddr.errors import UserError

#: Of a number: Python writes none of several thousand decimal digits into a sentence, though it reads it as 0x....
BITS = 1024
_EXPONENT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


class _StrictLoader(yaml.SafeLoader):
    """Plain YAML, but a key that stands twice is an error and not the last one's gain, and so is a reference: a file of
    a few lines of them would fill the memory."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            where = self.peek_event()
            raise yaml.composer.ComposerError(None, None, f"write out *{where.anchor} here", where.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in [self.construct_object(key, deep=True) for key, _ in node.value]:
            if isinstance(key, Hashable):  # else it is no key, which is said below
                if key in seen:
                    problem = f"the key {key!r} stands twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)


def _number(loader: _StrictLoader, node: yaml.ScalarNode) -> Any:
    if ":" in node.value:
        problem = f"{node.value} is a number of base 60 here; write out what it comes to, or put it in quotes"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    value: Any = (loader.construct_yaml_int if node.tag.endswith(":int") else loader.construct_yaml_float)(node)
    if isinstance(value, int) and value.bit_length() > BITS:
        raise yaml.constructor.ConstructorError(None, None, "a number of too many digits", node.start_mark)
    return value


def _no_time(loader: _StrictLoader, node: yaml.Node) -> Any:
    raise yaml.constructor.ConstructorError(None, None, "no key takes a time", node.start_mark)


# What looks like a date is a text, as the name of a folder.
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag != "tag:yaml.org,2002:timestamp"]
    for first, known in _StrictLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_constructor("tag:yaml.org,2002:timestamp", _no_time)
for _kind in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _number)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_StrictLoader` would take for a number."""


# YAML 1.1 takes 1e-4 for a string; here it is the number that everybody means.
for _side in (_StrictLoader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("+-.0123456789"))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as a mapping. Raises `UserError` where it is missing or is not one."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise UserError(f"{path}: the configuration cannot be read ({error.strerror}).") from None
    except RecursionError:
        raise UserError(f"{path}: this is not YAML: it is nested too deeply.") from None
    except (yaml.YAMLError, ValueError, LookupError) as error:  # the last two of `!!int abc` and `!!bool maybe`
        raise UserError(f"{path}: this is not YAML: {' '.join(str(error).split())}.") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a configuration is `key: value` lines, not a {type(tree).__name__}.")
    return tree


def write(tree: dict[str, Any]) -> str:
    """YAML that `read_yaml` reads back to an equal mapping."""
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text
