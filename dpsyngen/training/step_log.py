"""What is written down about each step of a phase: its figures, its time and, if wanted, TensorBoard's copy of both.

Times go into the private half for every phase, the public ones included: how long a step takes is a side channel, and a
release must be the same bytes whenever and wherever it was made.  docs/logging.md says what each figure is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpsyngen.training.public import Progress
from dpsyngen.training.run import JsonLines
from dpsyngen.training.tensorboard import TensorBoard

CLOCK = "timing.jsonl"

_ROWS = ("examples", "batch")  # what says how many images a step used


def timed(progress: Iterator[Progress]) -> Iterator[tuple[Progress, float]]:
    """Each step with the seconds that it took, without what the caller does between steps."""
    while True:
        begun = time.perf_counter()
        report = next(progress, None)
        if report is None:
            return
        yield report, time.perf_counter() - begun


class StepLog:
    """The logs of one phase in one session.

    Args:
        private: the run's private folder.
        phase: name of the phase.
        done: steps done before; lines of later ones are dropped, as these steps are taken again.
        figures: where the figures go; in the release half for a public phase.
        tensorboard: whether to write event files.
        warn: called if TensorBoard has to be given up.
    """

    def __init__(
        self,
        private: Path,
        phase: str,
        done: int,
        figures: JsonLines,
        *,
        tensorboard: bool,
        warn: Callable[[str], None],
    ) -> None:
        self.figures, self.clock = figures, JsonLines(private / CLOCK, 0o600)
        self._begun = time.perf_counter()
        self.figures.cut(phase, done + 1)
        self.clock.cut(phase, done + 1)
        self.board = TensorBoard(private, phase, done, warn) if tensorboard else None

    def write(self, report: Progress, seconds: float) -> None:
        """Write down a step.

        Raises:
            OSError: the disk is full or read-only.  The run is as if it was killed here, and can be resumed.
        """
        self.figures.append(phase=report.phase, step=report.step, **report.values)
        images = next((report.values[k] for k in _ROWS if k in report.values), 0)
        times = {"seconds": round(seconds, 6), "images_per_second": round(images / max(seconds, 1e-9), 3)}
        elapsed = round(time.perf_counter() - self._begun, 3)
        self.clock.append(phase=report.phase, step=report.step, time=round(time.time(), 3), elapsed=elapsed, **times)
        if self.board is not None:
            self.board.scalars(report.step, report.values | times)

    def draw(self, step: int, images: NDArray[np.uint8]) -> None:
        """Show generated images, uint8 [N, C, H, W], in TensorBoard."""
        if self.board is not None:
            self.board.images(step, "samples", images)

    def sync(self) -> None:
        """Flush everything to the disk, so that a checkpoint never outlives the lines before it."""
        self.figures.sync()
        self.clock.sync()
        if self.board is not None:
            self.board.flush()

    def close(self) -> None:
        """Close the event file; the other logs are closed after each line."""
        if self.board is not None:
            self.board.close()
