"""Files: written so that a crash leaves the old content or the new; read so that a hostile one is refused."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from dpsyngen.errors import ConfigError, DataError, DpsyngenError, RunError, printable

# What a killed process leaves behind must be told from anything that a user could have put there.
TEMPORARY_SUFFIX = ".dpsyngen-tmp"
_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}" + re.escape(TEMPORARY_SUFFIX))

# Of YAML
MAX_BYTES = 2**20
MAX_DEPTH = 32
MAX_VALUES = 20_000
MAX_DIGITS = 400  # characters of a number: more than any float or seed needs


# ------------------------------------------------------------------------------------------------------------ writing


def write_atomically(path: Path, write: Callable[[Path], object], mode: int = 0o644) -> None:
    """Call ``write(temporary path)``, flush it to the disk and rename it to `path`, whose folder must exist.

    A process that is killed meanwhile leaves a hidden temporary file beside `path`; see :func:`remove_temporaries`.

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
            mounted = "a file that is mounted by itself cannot be replaced: mount the folder that holds it"
            why = mounted if error.errno == errno.EBUSY else error.strerror
            raise OSError(error.errno, why, str(path)) from None
        raise


def write_bytes(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write `data` to `path`, atomically."""
    write_atomically(path, lambda temporary: temporary.write_bytes(data), mode)


def write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """Write `text` as UTF-8 to `path`, atomically."""
    write_bytes(path, text.encode(), mode)


def write_json(path: Path, value: Any, mode: int = 0o644) -> None:
    """Write `value` as indented JSON to `path`, atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n", mode)


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to the disk: what was renamed stays renamed after a power failure."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_disk(folder: Path) -> None:
    """Flush the file system of `folder`, and no other: for thousands of small files, each of which would take a while.

    OSError if something could not be written.
    """
    fd = os.open(folder, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(fd):  # which Python lacks
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
    except AttributeError:  # a system that lacks it, too
        os.sync()
    finally:
        os.close(fd)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with ``~`` as the home folder; as it is where nobody's is known, as in a container without users."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def cache_home() -> Path:
    """Where downloads and decoded images are kept: ``dpsyngen`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``.

    Without a home folder it is a folder of this user's below the folder for temporary files.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dpsyngen"
    except RuntimeError:
        folder = Path(tempfile.gettempdir()) / f"dpsyngen-{os.geteuid()}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = os.lstat(folder)
        own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022
        return folder if own else Path(tempfile.mkdtemp(prefix="dpsyngen-"))


OF_THE_DISK = ("lost+found", ".snapshot")  # what a fresh disk has in its uppermost folder
PARTIAL = ".dpsyngen-partial"


def require_possible(path: Path, option: str) -> None:
    """Raise RunError if `path` can never be made, as something above it is no folder."""
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not above.is_dir():
        raise RunError(f"{option} {path} cannot be made: {above} is not a folder.  Choose another place.")


def require_absent_or_empty(path: Path, option: str) -> None:
    """Raise RunError if the folder `path` has anything in it, so that nothing is overwritten, or cannot be made."""
    require_possible(path, option)
    found = [entry.name for entry in path.iterdir()] if path.is_dir() else [path.name] if os.path.lexists(path) else []
    part = " (it holds a part of what an interrupted command wrote)" if PARTIAL in found else ""
    if not set(found) <= {*OF_THE_DISK, PARTIAL}:
        raise RunError(
            f"{option} {path} exists already and is not an empty folder{part}.  Choose another, or move it away."
        )


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into; all in it is at `target` (absent or empty) at the end, and goes if something fails.

    It is beside `target`, which appears by one renaming.  Where `target` is there already, perhaps as a mounted disk,
    it is in it: a process that is killed leaves :data:`PARTIAL` there, alone or, if that was in the last moment, with
    some of what it wrote, which :func:`require_absent_or_empty` refuses.

    RunError: another process writes there, or has done so by now.
    """
    inside = target.is_dir()
    partial = target / PARTIAL if inside else target.with_name(f".{target.name}.partial")
    require_absent_or_empty(target, "--out")  # again, as long drawing may lie behind the first time
    with _held(partial, target):
        for path in partial.iterdir():  # of a process that was killed
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        moved: list[Path] = []
        try:
            yield partial
            for entry in partial.iterdir() if inside else ():
                moved.append(target / entry.name)
                entry.rename(moved[-1])
            partial.rmdir() if inside else partial.rename(target)
            sync_folder(target if inside else target.parent)
        except BaseException:
            for path in (*moved, partial):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _held(partial: Path, target: Path) -> Iterator[None]:
    """Make the folder, if it is not there, and hold its lock, which the system frees when the process ends."""
    partial.mkdir(exist_ok=True)
    with contextlib.ExitStack() as at_end:
        try:
            folder = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            at_end.callback(os.close, folder)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno == errno.EWOULDBLOCK:
                    raise
                # A disk without locks for folders, as NFS: nobody can be told of.
            mine = os.path.samestat(os.fstat(folder), os.lstat(partial))  # not so if it has become the target meanwhile
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:
            raise RunError(f"another process is writing to {target}.  Wait for it or stop it, or choose another place.")
        yield


def strict(value: Any) -> Any:
    """`value` for JSON: words for numbers that it lacks, text for paths, and lists for tuples, all the way down."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {str(k): strict(v) for k, v in value.items()}
    return [strict(v) for v in value] if isinstance(value, list | tuple) else value


def strict_text(value: Any, indent: int | None = None) -> str:
    """`value` as JSON text."""
    return json.dumps(strict(value), ensure_ascii=False, allow_nan=False, indent=indent)


def number(value: Any) -> Any:
    """The number that one of the words of :func:`strict` stands for; anything else as it is."""
    return float(value) if value in ("inf", "-inf", "nan") else value


# ------------------------------------------------------------------------------------------------------------ reading


class NotPlainError(Exception):
    """The file is not what was wanted; the message says why, and the caller adds which one."""


def open_plain(path: str | os.PathLike[str], max_bytes: int) -> BinaryIO:
    """The regular file `path`, opened for reading; links in the folders above it are followed.

    NotPlainError if it is missing, a link, not a regular file, or larger than `max_bytes`.
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
    status = os.fstat(descriptor)  # of what was opened, so nothing can take its place in between
    if stat.S_ISREG(status.st_mode) and status.st_size <= max_bytes:
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    over = f"{status.st_size:,} bytes: over the limit of {max_bytes:,}"
    raise NotPlainError(over if stat.S_ISREG(status.st_mode) else "not a plain file")


@contextlib.contextmanager
def damaged(path: str | os.PathLike[str], kind: str) -> Iterator[None]:
    """Make a DataError of whatever a damaged `path`, which should be `kind`, has a library raise: nearly anything."""
    try:
        yield
    except DpsyngenError:
        raise
    except NotPlainError as error:
        raise DataError(f"{printable(path)} cannot be read as {kind}: {error}.") from None
    except Exception as error:
        why = printable(error) or type(error).__name__
        raise DataError(
            f"{printable(path)} is not {kind}, or is damaged or truncated ({why}). Copy or save it again."
        ) from error


_CORE = "tag:yaml.org,2002:"
_TAGS = {_CORE + kind for kind in ("map", "seq", "str", "int", "float", "bool", "null")}


class _Loader(yaml.SafeLoader):
    """SafeLoader without tags, aliases, dates, names that are no text or are given twice, and with bounds."""

    # Dates stay text: a folder may be called 2024-01-01, and dates that do not exist crash PyYAML.
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag in _TAGS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _depth = _values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        self._values += 1
        self._depth += 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            # A few lines of aliases can stand for more values than fit into memory.
            raise _refused(event, "anchors and aliases (&, *) are not read: write the value out")
        if getattr(event, "tag", None):
            raise _refused(event, "tags (!) are not read: write a plain value")
        if self._values > MAX_VALUES or self._depth > MAX_DEPTH:
            raise _refused(event, f"more than {MAX_VALUES:,} values, or nested more than {MAX_DEPTH} deep")
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


def _refused(where: Any, why: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, why, where.start_mark)


def read_yaml(text: str, name: str) -> Any:
    """What a YAML text of at most 1 MiB, called `name`, holds; ConfigError if it is not YAML or beyond our bounds."""
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{printable(name)} has {len(text):,} characters; at most {MAX_BYTES:,} are read.")
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        # PyYAML's own text quotes the input as it is.
        why = "; ".join(printable(part, 200) for part in (error.context, error.problem) if part)
        mark = error.problem_mark or error.context_mark
        why += f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # numbers that only look like numbers
        why = printable(error, 200)
    raise ConfigError(f"{printable(name)} is not valid YAML: {why}.")


def read_yaml_file(path: Path, name: str) -> Any:
    """What a YAML file or pipe (``--config <(…)``) holds, as :func:`read_yaml`; never more than 1 MiB is read."""
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(MAX_BYTES + 1) if stat.S_ISREG(mode) or stat.S_ISFIFO(mode) else None
        if content is not None and len(content) <= MAX_BYTES:
            return read_yaml(content.decode("utf-8-sig"), f"{name} {path}")
        why = "is not a file" if content is None else f"is larger than {MAX_BYTES:,} bytes, which no settings need"
    except ConfigError:
        raise
    except OSError as error:
        why = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError:
        why = "is not UTF-8 text"
    except ValueError:  # a NUL in the path
        why = "cannot be a path"
    raise ConfigError(f"{name} {printable(path)} {why}.")


# ------------------------------------------------------------------------------------------------- of Linux itself


def proc(file: str, name: str) -> Iterator[str]:
    """Values of the lines "name: value" of a file of /proc; none where there is no such file."""
    with contextlib.suppress(OSError):
        for line in Path(file).read_text(encoding="utf-8", errors="replace").splitlines():
            if line.partition(":")[0].strip() == name:
                yield line.partition(":")[2].strip()


def memory_bytes() -> tuple[int, int]:
    """Memory of the machine, and what of it a new program could use without swapping; at most those of a container."""
    total, free = (int(next(proc("/proc/meminfo", n)).split()[0]) * 1024 for n in ("MemTotal", "MemAvailable"))
    with contextlib.suppress(OSError, ValueError):  # cgroup v2; "max" is no number: no limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{n}").read_text(encoding="ascii")) for n in ("max", "current"))
        # Pages of files count as used, but give way.
        counts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        total, free = min(total, limit), min(free, max(limit - used + int(counts.get("file", 0)), 0))
    return total, free
