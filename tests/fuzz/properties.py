"""What must hold for any input: a sound result or a DpsyngenError, and nothing else happens."""

from __future__ import annotations

import io
import os
import re
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, settings

import dpsyngen
from dpsyngen.data import ImageDataset, load_images
from dpsyngen.errors import DpsyngenError

FACTOR = int(os.environ.get("DPSYNGEN_FUZZ", "1"))
tried: Counter[str] = Counter()
accepted: Counter[str] = Counter()

_FORBIDDEN = ("pickle.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "socket.")
_PACKAGE = str(Path(dpsyngen.__file__).parent) + os.sep
_watched: list[tuple[Path, list[str], bool]] = []


def examples(count: int) -> Any:
    """Hypothesis settings for ``count`` examples, the same ones each time unless DPSYNGEN_FUZZ is set."""
    return settings(
        max_examples=count * FACTOR,
        derandomize=FACTOR == 1,
        database=None,
        deadline=None,
        # Mutations are drawn from one number, which has nothing to shrink.
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    folder, seen, scratch = _watched[-1]
    if event == "open":
        name, _, flags = arguments
        if isinstance(name, int):
            return
        path = os.fsdecode(name)
        if scratch and (path.startswith(str(folder)) or (os.sep not in path and not os.path.exists(path))):
            return  # folders are cleared by names relative to each other
        if flags & (os.O_WRONLY | os.O_RDWR):
            seen.append(f"wrote {path}")
        harmless = path.startswith(("/proc/meminfo", "/sys/fs/cgroup/memory.")) or path.endswith(
            (".py", ".pyc", ".so", "__pycache__")
        )
        harmless = harmless or path.startswith(_PACKAGE)  # presets
        if not harmless and not path.startswith(str(folder)):
            seen.append(f"opened {path}")
    elif event.startswith(_FORBIDDEN):
        seen.append(event)


sys.addaudithook(_hook)


@contextmanager
def nothing_else_happens(folder: Path, scratch: bool = False) -> Iterator[None]:
    """Fail if a file outside ``folder`` is opened, something is unpickled or run, or a library gives a warning.

    With ``scratch`` files may be written below ``folder``.
    """
    seen: list[str] = []
    _watched.append((folder, seen, scratch))
    try:
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            yield
    finally:
        _watched.pop()
    assert not seen, seen
    own = re.compile("ignored|nearly black|matches the splits")  # what load_images says by itself
    assert not [str(w.message) for w in given if not own.search(str(w.message))]


def is_sound(data: ImageDataset) -> None:
    """The invariants that :class:`ImageDataset` documents."""
    n, c, h, w = data.images.shape
    assert data.images.dtype == np.uint8
    assert n >= 1
    assert c in (1, 3)
    assert 8 <= h == w <= 64
    assert (data.labels is None) == (data.class_names == ())
    if data.labels is not None:
        assert data.labels.dtype == np.int64
        assert data.labels.shape == (n,)
        assert 0 <= data.labels.min() <= data.labels.max() < len(data.class_names)
        "".join(data.class_names).encode("utf-8")
    assert data.batch([0, n - 1]).shape == (2, c, h, w)
    assert len(data.fingerprint()) == 64


def load_or_refuse(kind: str, source: Path, **options: Any) -> ImageDataset | None:
    """The images of a file or folder if they are sound, or None if they are refused as they should be."""
    tried[kind] += 1
    with nothing_else_happens(source.parent if source.is_file() else source):
        try:
            data = load_images(source, **options)
        except DpsyngenError as error:
            is_printable(str(error))
            return None
    is_sound(data)
    accepted[kind] += 1
    return data


def is_printable(message: str) -> None:
    """A message may go to a terminal as it is."""
    assert message
    assert len(message) < 10_000, len(message)
    message.encode("utf-8")
    assert all(c.isprintable() or c == "\n" for c in message), repr(message)


def zip_of(members: list[tuple[str, bytes]], compress: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip file; unlike numpy this allows any names, repeated ones too."""
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w", compress) as archive:
        warnings.simplefilter("ignore")  # of repeated names
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, compress)
    return stream.getvalue()
