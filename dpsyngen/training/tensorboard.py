"""Event files for TensorBoard in the private half: one folder, that is one "run" of TensorBoard's, for each phase.

They are for looking at and nothing rests on them.  Where they cannot be written the training goes on without them, and
says so: stopping would cost more than it saves, as the same figures are in ``training.jsonl``.

The files are written here and now, by no thread of the library's, so that an error is seen where it happens.  Each
session of a run writes a file of its own, whose first event tells TensorBoard to forget the steps that are repeated.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import ConfigError
from dpsyngen.programs.grid import image_grid

FOLDER = "tensorboard"
FLUSH_SECONDS = 5.0
"""How old what TensorBoard shows may be."""


def require_tensorboard() -> None:
    """Raise ConfigError if what writes the event files is not installed."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise ConfigError(
            "logging.tensorboard is on, but the package tensorboardX, which writes the files, is not installed: "
            "`pip install 'dpsyngen[tensorboard]'`, or leave out --tensorboard (the same figures are in "
            "private/training.jsonl)."
        )


class TensorBoard:
    """Events of one phase in one session.

    Args:
        private: the run's private folder.
        phase: name of the phase.
        done: steps done before this session; later ones in earlier files are to be forgotten.
        warn: called once if the files cannot be written; from then on nothing is.
    """

    def __init__(self, private: Path, phase: str, done: int, warn: Callable[[str], None]) -> None:
        self.folder, self.warn = private / FOLDER / phase, warn
        self._writer: Any = None
        self._flushed = time.monotonic()
        self._guarded(lambda: self._open(done))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add the finite ones of some figures, by name."""
        for name, value in values.items():
            if math.isfinite(value):
                self._event(step, name, float(value))
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()

    def images(self, step: int, name: str, images: NDArray[np.uint8]) -> None:
        """Add uint8 [N, C, H, W] images as one picture."""
        picture = np.asarray(image_grid(images, math.ceil(math.sqrt(len(images))), scale=2))
        self._event(step, name, picture[..., None] if picture.ndim == 2 else picture)
        self.flush()

    def flush(self) -> None:
        """Write everything to the disk, so that a checkpoint never outlives the events before it."""
        self._flushed = time.monotonic()
        self._guarded(lambda: self._writer and self._writer.flush())

    def close(self) -> None:
        """Flush and close the file."""
        self.flush()
        self._guarded(lambda: self._writer and self._writer.close())
        self._writer = None

    def _open(self, done: int) -> None:
        from tensorboardX.record_writer import RecordWriter

        for folder in (self.folder.parent, self.folder):
            folder.mkdir(mode=0o700, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        taken = [int(p.name.split(".")[3]) for p in self.folder.glob("events.out.tfevents.*") if p.suffix[1:].isdigit()]
        path = self.folder / f"events.out.tfevents.{max(taken, default=-1) + 1:010d}"
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        self._writer = RecordWriter(str(path.absolute()))
        self._write(file_version="brain.Event:2")
        self._write(step=done + 1, session_log={"status": 1})  # START: forget what is there of this step and later
        self._writer.flush()

    def _event(self, step: int, name: str, value: float | NDArray[np.uint8]) -> None:
        def write() -> None:
            from tensorboardX.summary import image, scalar

            summary = scalar(name, value) if isinstance(value, float) else image(name, value, 1, "HWC")
            self._write(step=step, summary=summary)

        if self._writer is not None:
            self._guarded(write)

    def _write(self, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write(Event(wall_time=time.time(), **content).SerializeToString())

    def _guarded(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # whatever it is, a picture of the training is not worth the training
            writer, self._writer = self._writer, None
            why = (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}"
            self.warn(
                f"TensorBoard files in {self.folder} cannot be written ({why}); the training goes on without them, and "
                "training.jsonl has the same figures"
            )
            if writer is not None:
                _abandon(writer)


def _abandon(writer: Any) -> None:
    """Close a file that cannot be written; what it has not written yet it would try to write again."""
    with contextlib.suppress(OSError, ValueError):
        writer.close()
