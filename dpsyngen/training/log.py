"""What a training reports: events for whoever watches, lines in the run's logs, and TensorBoard's copy of both.

Times go into the private half for every phase, also for public ones: how long a step takes is a side channel, and a
release must be the same bytes whenever and wherever it was made.  docs/logging.md says what each figure is.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpsyngen.console import Console
from dpsyngen.errors import require_package
from dpsyngen.files import number, strict_text, write_text

# ------------------------------------------------------------------------------------------------ events


@dataclass(frozen=True)
class Note:
    """A line about what is being done; `private` if it must not be published."""

    text: str
    private: bool = False


@dataclass(frozen=True)
class Warned:
    """Something was given up, but not the training."""

    text: str


@dataclass(frozen=True)
class Reading:
    """`done` of `total` images are read; the numbers are private if `private`."""

    done: int
    total: int
    private: bool


@dataclass(frozen=True)
class Step:
    """One finished step of a phase."""

    phase: str
    step: int  # steps done, from 1; queries of DP moments are all done at once
    steps: int  # of the phase
    values: dict[str, float]  # figures for the log; private if the phase is
    private: bool = False  # the phase trains on private images


Event = Note | Warned | Reading | Step
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """An ``on_event`` that does nothing."""


class Display:
    """Shows events on a console; a context manager that yields the callback.

    A notebook keeps its output and is published, and log collectors carry theirs to other machines: private figures are
    shown only where `private` is set.
    """

    patience = 3.0  # seconds that reading images may take before it is told

    def __init__(self, console: Console, private: bool = False) -> None:
        self.console, self.private = console, private
        self._begun, self._reading = time.monotonic(), False

    def __enter__(self) -> OnEvent:
        return self._show

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.console.track_ends(error)

    def _show(self, event: Event) -> None:
        if isinstance(event, Warned):
            self.console.warn(event.text)
        elif isinstance(event, Note):
            if self.private or not event.private:
                self.console.note(event.text)
        elif isinstance(event, Reading):
            late = time.monotonic() - self._begun >= self.patience
            if not event.private and (self._reading or (late and event.done < event.total)):
                self._reading = True
                self.console.track("reading images", event.done, event.total, "images")
                if event.done >= event.total:
                    self.console.track_ends()
        elif event.values:
            what, loss = "DP-SGD on private images" if event.private else "programmatic images", event.values["loss"]
            note = f"loss {loss:.3f}" + (" (private)" if event.private else "")
            if event.private and not self.private:
                note = ""
            self.console.track(f"{event.phase}: {what}", event.step, event.steps, "steps", note, start=event.step - 1)


def timed(progress: Iterator[Step]) -> Iterator[tuple[Step, float]]:
    """Each step with the seconds that it took, without what the caller does between steps."""
    begun = time.perf_counter()
    for report in progress:
        yield report, time.perf_counter() - begun
        begun = time.perf_counter()


# -------------------------------------------------------------------------------------------------- logs


class JsonLines:
    """A log of one JSON object a line, each with a phase and a step, that can be cut back when a run resumes.

    No result depends on it: lines that cannot be read are left out.  A number that JSON lacks, such as a loss that is
    not finite, is the word "inf", "-inf" or "nan" in the file, and a number again when it is read here.
    """

    def __init__(self, path: Path, mode: int) -> None:
        self.path, self.mode = path, mode

    def append(self, **values: Any) -> None:
        """Add a line."""
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, self.mode)
        with os.fdopen(fd, "w") as f:
            f.write(strict_text(values) + "\n")

    def sync(self) -> None:
        """Flush the lines to the disk."""
        if self.path.exists():
            with open(self.path, "rb+") as f:
                os.fsync(f.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All complete lines."""
        if not self.path.exists():
            return []
        lines = (_parsed(line) for line in self.path.read_bytes().split(b"\n")[:-1])
        return [line for line in lines if line is not None]

    def cut(self, phase: str, step: int) -> None:
        """Drop the lines of `phase` from `step` on: they will be written again."""
        if self.path.exists():
            kept = [v for v in self.read() if v["phase"] != phase or v["step"] < step]
            write_text(self.path, "".join(strict_text(v) + "\n" for v in kept), self.mode)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if isinstance(values, dict) and isinstance(values.get("phase"), str) and type(values.get("step")) is int:
        return {k: v if k == "phase" else number(v) for k, v in values.items()}
    return None


CLOCK, PREVIEW = "timing.jsonl", "preview.png"


class StepLog:
    """The logs of one phase in one session: `figures` (in the release half for a public phase), the clock, TensorBoard.

    Lines of more than `done` steps are dropped, as these steps are taken again.
    """

    def __init__(
        self, private: Path, phase: str, done: int, figures: JsonLines, board: TensorBoard | None = None
    ) -> None:
        self.figures, self.clock, self.board = figures, JsonLines(private / CLOCK, 0o600), board
        self._begun = time.perf_counter()
        self.figures.cut(phase, done + 1)
        self.clock.cut(phase, done + 1)

    def write(self, report: Step, seconds: float) -> None:
        """Write down a step.  An OSError leaves the run as if it was killed here: it can be resumed."""
        self.figures.append(phase=report.phase, step=report.step, **report.values)
        images = report.values.get("examples", report.values.get("batch", 0))  # that the step used
        times = {"seconds": round(seconds, 6), "images_per_second": round(images / max(seconds, 1e-9), 3)}
        elapsed = round(time.perf_counter() - self._begun, 3)
        self.clock.append(phase=report.phase, step=report.step, time=round(time.time(), 3), elapsed=elapsed, **times)
        if self.board is not None:
            self.board.scalars(report.step, report.values | times)

    def sync(self) -> None:
        """Flush everything to the disk, so that a checkpoint never outlives the lines before it."""
        self.figures.sync()
        self.clock.sync()
        if self.board is not None:
            self.board.flush()

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


# ------------------------------------------------------------------------------------------- TensorBoard

FLUSH_SECONDS = 5.0
"""How old what TensorBoard shows may be."""


def require_tensorboard() -> None:
    """Raise ConfigError if the package that writes event files is not installed."""
    require_package("tensorboardX", "--tensorboard (private/training.jsonl has the same figures)", "tensorboard")


class TensorBoard:
    """Event files of one phase in one session, below ``private/tensorboard``.

    Where they cannot be written, the training goes on without them, and `on_event` is told so once.  The records are
    written here and not by tensorboardX's SummaryWriter, whose thread dies silently on a full disk; the training would
    then wait for it for ever.  TensorBoard is told to forget steps after the `done` ones in earlier files.
    """

    def __init__(self, private: Path, phase: str, done: int, on_event: OnEvent) -> None:
        self.folder, self.on_event = private / "tensorboard" / phase, on_event
        self._writer: Any = None
        self._flushed = time.monotonic()
        self._guarded(lambda: self._open(done))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add the finite ones of some figures, by name."""
        self._guarded(lambda: self._scalars(step, values))
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._flushed = time.monotonic()
        self._guarded(lambda: self._writer and self._writer.flush())

    def close(self) -> None:
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

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX import summary

        for name, value in values.items():
            if math.isfinite(value):
                self._write(step=step, summary=summary.scalar(name, float(value)))

    def _write(self, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        if self._writer is not None:
            self._writer.write(Event(wall_time=time.time(), **content).SerializeToString())

    def _guarded(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # whatever it is, a curve of the training is not worth the training
            writer, self._writer = self._writer, None
            why = (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}"
            text = f"TensorBoard files in {self.folder} cannot be written ({why}); the training goes on without them"
            self.on_event(Warned(f"{text}, and training.jsonl has the same figures"))
            if writer is not None:
                with contextlib.suppress(OSError, ValueError):  # it tries again to write what is left
                    writer.close()
