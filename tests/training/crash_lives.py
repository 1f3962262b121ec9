"""The test's end of crash_zygote.py, and what has to be true of a run however often it was killed."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dpsyngen.files import is_temporary
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.training.log import CLOCK
from dpsyngen.training.private import charged_steps

LONG = os.environ.get("DPSYNGEN_LONG") == "1"
long_test = pytest.mark.skipif(not LONG, reason="takes many minutes; set DPSYNGEN_LONG=1")


class Lives:
    """Lives of training processes, one after the other."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("crash_zygote.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def live(self, out: Path, **request: Any) -> bool:
        """One life of the run in `out`; whether it came to its end.  Any other end than by SIGKILL is an error."""
        answer = self.ask(out, **request)
        assert answer["code"] in (0, None), answer["error"]
        assert answer["signal"] in (0, signal.SIGKILL)
        return bool(answer["code"] == 0)

    def ask(self, out: Path, **request: Any) -> dict[str, Any]:
        """One life, however it ends; see crash_zygote.py for requests and answers."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"out": str(out), **request}) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def content(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, but for the one that says how long things took."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CLOCK)
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def recorded(path: Path) -> list[tuple[int, str, str, str]]:
    """Uses of noise that lives wrote down: step, and digests of indices, sum and noise."""
    if not path.exists():
        return []
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()]


def require_noise_is_used_once(uses: list[tuple[int, str, str, str]]) -> None:
    """A step has always the same records, sum and noise, and no noise is ever added to two sums."""
    by_step = {step: (step, *rest) for step, *rest in uses}
    by_noise = {noise: (indices, total) for _, indices, total, noise in uses}
    for use in uses:
        assert use == by_step[use[0]], f"step {use[0]} was taken in two ways"
        assert use[1:3] == by_noise[use[3]], f"noise of step {use[0]} was added to two sums"
    assert len(by_noise) == len(by_step)


def require_charged(out: Path, uses: list[tuple[int, str, str, str]]) -> None:
    """Right after a crash: the ledger can be read and has every step whose noise was used."""
    path = out / "private" / "ledger.jsonl"
    if not path.exists():
        assert not uses
        return
    assert charged_steps(Ledger(path)) >= len({use[0] for use in uses})


def require_sound(out: Path, steps: int) -> None:
    """A finished run has every charge, states its ε, has the right modes, and nothing unfinished lies about."""
    ledger = Ledger(out / "private" / "ledger.jsonl")
    assert charged_steps(ledger) == steps
    statement = json.loads((out / "release" / "privacy.json").read_text())
    assert statement["epsilon"] == ledger.epsilon() <= 8
    everything = [out, *out.rglob("*")]
    assert not [p for p in everything if is_temporary(p.name) or p.name.startswith(".")]
    for p in everything:
        mode, private = stat.S_IMODE(p.stat().st_mode), "private" in p.relative_to(out).parts
        if private:
            assert mode == (0o700 if p.is_dir() else 0o600), p
        elif p.is_file():
            assert mode == 0o644, p
