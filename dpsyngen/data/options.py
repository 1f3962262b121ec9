"""How images are read: what the arguments of :func:`dpsyngen.data.load.load_images` come to."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dpsyngen.data.cache import Cache, default_folder
from dpsyngen.errors import ConfigError

Progress = Callable[[int, int], None]
Channels = Literal["auto", "grey", "rgb"]
IN_MEMORY_BYTES = 2**30
"""Decoded images that take more go to a file (with ``cache="auto"``)."""


@dataclass(frozen=True)
class Options:
    """How images are read.

    Attributes:
        resolution: None: the native one if all images are one square of 8..64 pixels, else 32.
        channels: "auto": grey if every image is stored in grey.
        labels: whether labels are read.
        skip_bad: leave out bad images instead of raising.
        cache: "auto", or the folder in which decoded images lie.
        workers: processes that decode; None: one for each core.
        on_progress: called as ``(done, total)`` while decoding.
    """

    resolution: int | None = None
    channels: Channels = "auto"
    labels: bool = True
    skip_bad: bool = False
    cache: str | os.PathLike[str] = "auto"
    workers: int | None = None
    on_progress: Progress | None = None

    @property
    def store(self) -> Cache:
        """Where decoded images lie if they do not lie in memory."""
        return Cache(default_folder() if self.always_in_memory_if_small else Path(self.cache).expanduser())

    @property
    def always_in_memory_if_small(self) -> bool:
        """Whether the size decides."""
        return self.cache == "auto"

    @property
    def processes(self) -> int:
        """How many decode."""
        return self.workers or len(os.sched_getaffinity(0))


def in_memory_bytes() -> int:
    """What a process may hold decoded: 1 GiB, shared among the processes that torchrun started on this machine."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return IN_MEMORY_BYTES // max(1, int(ranks) if ranks.isdigit() else 1)


def check_workers(workers: int | None) -> int | None:
    """``workers`` if it is None or from 1 to 1024.

    Raises:
        ConfigError: it is something else.
    """
    if workers is None or (isinstance(workers, int) and not isinstance(workers, bool) and 1 <= workers <= 1024):
        return workers
    raise ConfigError(f"workers must be a whole number from 1 to 1024, or left out for one a core, not {workers!r}.")
