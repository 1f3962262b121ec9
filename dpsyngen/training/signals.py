"""Ctrl-C and its like end a training politely."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator

from dpsyngen.training.pipeline import Training


@contextlib.contextmanager
def stop_on_signals(training: Training, tell: Callable[[str], None]) -> Iterator[None]:
    """Ctrl-C, SIGTERM and a closed terminal end the run after the current step, with a checkpoint; a second one ends it
    at once.

    torchrun passes signals on to its processes, to which a terminal has sent them already, and kills what still runs
    after half a minute: with several processes one signal after another counts as one.
    """

    def handler(number: int, frame: object) -> None:
        if training.stop_requested:
            if not training.ranks.alone:
                return
            raise KeyboardInterrupt
        training.stop_requested = True
        try:
            at_once = " (Ctrl-C again to stop at once)" if training.ranks.alone else ""
            tell(f"stopping after this step{at_once} …")
        except OSError:
            # The terminal is gone, and with it every place to write to: what is said from now on must not end the step.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for output in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    os.dup2(nowhere, output.fileno())
            os.close(nowhere)

    chosen = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        chosen.append(signal.SIGHUP)
    before = {s: signal.signal(s, handler) for s in chosen}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
