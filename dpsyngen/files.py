"""Writing files so that a crash leaves the old content or the new, never a piece."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from dpsyngen.errors import ConfigError, printable

# What a killed process leaves behind must be told from anything that a user could have put there.
TEMPORARY_SUFFIX = ".dpsyngen-tmp"
_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}" + re.escape(TEMPORARY_SUFFIX))


def write_atomically(path: Path, write: Callable[[Path], None], mode: int = 0o644) -> None:
    """Call ``write(temporary path)``, flush it to the disk and rename it to `path`.

    A process that is killed meanwhile leaves a hidden temporary file beside `path`; see :func:`remove_temporaries`.

    Args:
        path: where the content ends up; its folder must exist.
        write: writes the content to the path it is given.
        mode: permissions of the file.

    Raises:
        OSError: the disk is full, read-only, …; it names `path`, which is as it was before.
    """
    temporary: Path | None = None
    try:
        # A file name has 255 bytes at most, four a character.
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:50]}.", suffix=TEMPORARY_SUFFIX)
        os.close(fd)
        temporary = Path(name)
        write(temporary)
        os.chmod(temporary, mode)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def write_bytes(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write `data` to `path`, atomically."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    write_atomically(path, write, mode)


def write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """Write `text` as UTF-8 to `path`, atomically."""
    write_bytes(path, text.encode(), mode)


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to the disk: what was renamed stays renamed after a power failure."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_temporary(name: str) -> bool:
    """Whether `name` is one that this module gives to unfinished files."""
    return _TEMPORARY.fullmatch(name) is not None


def remove_temporaries(folder: Path) -> None:
    """Remove the unfinished files that killed processes left in `folder`, and nothing else; not in its sub-folders.

    Call it only where no other process can be writing.
    """
    with os.scandir(folder) as entries:
        left = [e.path for e in entries if is_temporary(e.name) and e.is_file(follow_symlinks=False)]
    for name in left:
        Path(name).unlink(missing_ok=True)


def require_absent_or_empty(path: Path, option: str) -> None:
    """Raise RunError if the folder `path` has anything in it, so that nothing is ever overwritten."""
    from dpsyngen.errors import RunError

    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise RunError(
            f"{option} {path} exists already and is not an empty folder.  Choose another path or move it away."
        )


class NotPlainError(Exception):
    """The file is not what was wanted; the message says why, and the caller adds which one."""


def open_plain(path: str | os.PathLike[str], max_bytes: int) -> BinaryIO:
    """The regular file `path`, opened for reading.

    What is checked is what was opened, so nothing can take its place in between.  Links in the folders above are
    followed.

    Raises:
        NotPlainError: it is missing, a link, not a regular file, or larger than ``max_bytes``.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        linked = error.errno == errno.ELOOP
        why = "a symbolic link, which is not followed" if linked else error.strerror
        raise NotPlainError(f"cannot be opened ({why})") from None
    except ValueError:
        raise NotPlainError("cannot be opened (its name cannot be a path)") from None
    status = os.fstat(descriptor)
    why = ""
    if not stat.S_ISREG(status.st_mode):
        why = "not a plain file"
    elif status.st_size > max_bytes:
        why = f"{status.st_size:,} bytes: over the limit of {max_bytes:,}"
    if why:
        os.close(descriptor)
        raise NotPlainError(why)
    return os.fdopen(descriptor, "rb")


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


_WORDS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def strict(value: Any) -> Any:
    """`value` with words for numbers that JSON lacks, text for paths, and lists for tuples, all the way down."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {str(k): strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [strict(v) for v in value]
    return value


def strict_text(value: Any, indent: int | None = None) -> str:
    """`value` as JSON text."""
    return json.dumps(strict(value), ensure_ascii=False, allow_nan=False, indent=indent)


def number(value: Any) -> Any:
    """The number that one of the words stands for; anything else as it is."""
    return _WORDS.get(value, value) if isinstance(value, str) else value
