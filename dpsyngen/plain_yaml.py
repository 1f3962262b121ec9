"""YAML as settings need it: mappings with text keys, lists, text, numbers, yes/no and null.  Nothing else is read.

Refused, each with its place in the text: tags (which can make objects), anchors and aliases (a few lines can stand for
more values than fit into memory), keys that are given twice (of which YAML would silently keep the last), keys that are
not text, and texts that are too long, too deep or of too many values.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import yaml

from dpsyngen.errors import ConfigError
from dpsyngen.shown import printable

MAX_BYTES = 2**20
MAX_DEPTH = 32
MAX_VALUES = 20_000
MAX_DIGITS = 400  # characters of a number: more than any float or seed needs

_CORE = "tag:yaml.org,2002:"
_TAGS = {_CORE + kind for kind in ("map", "seq", "str", "int", "float", "bool", "null")}


class _Loader(yaml.SafeLoader):
    """SafeLoader with less in it."""

    # Dates stay text: a folder may be called 2024-01-01, and dates that do not exist crash PyYAML.
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag in _TAGS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {  # noqa: RUF012
        tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag in _TAGS or tag is None
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _refused(event, "anchors and aliases (&, *) are not read: write the value out")
        if getattr(event, "tag", None) is not None:
            raise _refused(event, "tags (!) are not read: write a plain value")
        self._values += 1
        if self._values > MAX_VALUES:
            raise _refused(event, f"more than {MAX_VALUES:,} values")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _refused(event, f"nested more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != _CORE + "str":
                raise _refused(key, "a name that is not text: put it in quotes")
            if key.value in seen:
                raise _refused(key, f"{printable(key.value, 80)} is given twice: leave one out")
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        if node.tag in (_CORE + "int", _CORE + "float") and len(node.value) > MAX_DIGITS:
            raise _refused(node, f"a number of more than {MAX_DIGITS} characters")
        return super().construct_scalar(node)


def _refused(where: yaml.Event | yaml.Node, why: str) -> yaml.MarkedYAMLError:
    mark: Any = where.start_mark
    return yaml.MarkedYAMLError(None, None, why, mark)


def read_yaml(text: str, name: str) -> Any:
    """What a YAML text holds.

    Args:
        text: at most 1 MiB; :func:`read_yaml_file` sees to that before it is in memory.
        name: what the text is, for messages.

    Raises:
        ConfigError: not YAML, or more than the module's first lines allow.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{printable(name)} has {len(text):,} characters; at most {MAX_BYTES:,} are read.")
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ConfigError(f"{printable(name)} is not valid YAML: {_explain(error)}.") from None
    except (ValueError, RecursionError) as error:  # numbers that only look like numbers
        raise ConfigError(f"{printable(name)} is not valid YAML: {printable(error)}.") from None


def read_yaml_file(path: Path, name: str) -> Any:
    """What a YAML file holds; a pipe is read as well (``--config <(…)``), but never more than 1 MiB of anything.

    Raises:
        ConfigError: as :func:`read_yaml`, or the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
                raise ConfigError(f"{name} {printable(path)} is not a file.")
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{name} {printable(path)} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{name} {printable(path)} is not UTF-8 text.") from None
    except ValueError:  # a NUL in the path
        raise ConfigError(f"{name} {printable(path)} cannot be a path.") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{name} {printable(path)} is larger than {MAX_BYTES:,} bytes, which no settings need.")
    return read_yaml(text, f"{name} {path}")


def _explain(error: yaml.YAMLError) -> str:
    """What is wrong and where, in one line; PyYAML's own text quotes the input as it is."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return printable(error, 200)
    parts = [printable(part, 200) for part in (error.context, error.problem) if part]
    mark = error.problem_mark or error.context_mark
    where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return "; ".join(parts) + where
