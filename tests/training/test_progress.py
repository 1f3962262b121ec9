"""How far a run is, seen from another process; and the picture of what is drawn meanwhile."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpsyngen import fit
from dpsyngen.config import load_config
from dpsyngen.data import load_images
from dpsyngen.errors import RunError
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.report.html import loss_charts
from dpsyngen.training import pipeline
from dpsyngen.training.progress import progress_of, worker
from dpsyngen.training.run import Run


def begin(settings: dict, out: Path, arrays: tuple[np.ndarray, np.ndarray], **logging: object) -> fit.Training:
    given = {**settings, "privacy": {"epsilon": 4.0, "delta": 1e-3}, "logging": logging}
    return fit.prepare(load_config(given), out, load_images(arrays))


@pytest.mark.slow
def test_a_run_is_followed_from_its_files(tiny_settings, tiny_images, tmp_path: Path) -> None:
    training = begin(tiny_settings, tmp_path / "r", tiny_images(), pictures=2)
    run, seen = Run(tmp_path / "r"), []
    before = progress_of(run)
    assert (before.state, before.phases, before.epsilon, before.target) == ("training", [], 0.0, 4.0)
    for step in training.steps():
        now = progress_of(run)
        seen.append((now.phases[-1].name, now.phases[-1].done, now.phases[-1].private))
        assert seen[-1] == (step.phase, step.step, step.private)
        assert now.epsilon == Ledger(run.ledger_path).epsilon()
        assert now.seconds_left is not None
        training.stop_requested = step.private and step.step == 4
    stopped = progress_of(run)
    assert stopped.state == "interrupted"
    assert stopped.seconds_left is None
    assert [(p.done, p.steps) for p in stopped.phases] == [(3, 3), (3, 3), (4, 6)]
    assert 0 < stopped.epsilon < 4.0
    assert stopped.preview == run.private / "preview.png"
    assert stopped.preview.stat().st_mode & 0o077 == 0
    with Image.open(stopped.preview) as picture:
        assert picture.width > 4 * 8
    logs = [[line for p in stopped.phases if p.private == private for line in p.log] for private in (False, True)]
    assert [len(loss_charts(log, "public")) for log in logs] == [2, 1]


@pytest.mark.slow
def test_pictures_change_no_step_and_are_not_released(tiny_settings, tiny_images, tmp_path: Path) -> None:
    released = []
    for name, pictures in (("a", None), ("b", 1)):
        settings = {k: dict(v) for k, v in tiny_settings.items()}
        given = {**settings, "privacy": {"epsilon": 4.0, "delta": 1e-3, "insecure_seed": 1}}
        given["logging"] = {"pictures": pictures}
        training = fit.prepare(load_config(given), tmp_path / name, load_images(tiny_images()))
        fit.carry_out(training)
        run = training.run
        assert (run.private / "preview.png").exists() == (pictures is not None)
        released.append({p.name: p.read_bytes() for p in run.release.rglob("*.safetensors")})
        assert "preview.png" not in {p.name for p in run.release.rglob("*")}
    assert released[0] == released[1]


def test_pictures_diagonalise_no_moments_again(tiny_settings, tiny_images, tmp_path: Path, monkeypatch) -> None:
    loaded, load = [], pipeline.load_gaussian
    monkeypatch.setattr(pipeline, "load_gaussian", lambda *given: loaded.append(given) or load(*given))
    settings = {**tiny_settings, "stages": {"variant": "residual"}}
    training = begin(settings, tmp_path / "r", tiny_images(), pictures=1)
    assert sum(1 for step in training.steps() if step.phase == "context") == tiny_settings["private"]["steps"]
    assert (training.run.private / "preview.png").exists()
    assert len(loaded) == 1


def test_a_finished_run(finished: Run) -> None:
    now = progress_of(finished)
    assert now.state == "finished"
    assert now.seconds_left is None
    assert not finished.busy


@contextmanager
def beside(code: str) -> Iterator[int]:
    """The number of another process, which has run `code` and waits."""
    command = [sys.executable, "-c", f"{code}print('here', flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "here\n"
        yield other.pid
        other.stdin.close()


def test_who_works_on_a_run_is_found(finished: Run, tmp_path: Path) -> None:
    path = tmp_path / "r"
    shutil.copytree(finished.path, path)
    assert worker(path) is None
    code = "from pathlib import Path; from dpsyngen.training.run import Run\n"
    with beside(f"{code}held = Run(Path({str(path)!r})).lock()\nheld.__enter__()\n") as other:
        assert Run(path).busy
        assert worker(path) == other != os.getpid()
    assert not Run(path).busy
    assert worker(path) is None


def test_somebody_who_looks_is_nobody_who_works(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.path, tmp_path / "r")
    code = f"import fcntl\nfile = open({str(tmp_path / 'r' / 'private' / 'lock')!r})\n"
    with beside(f"{code}fcntl.flock(file, fcntl.LOCK_SH)\n"):
        assert worker(tmp_path / "r") is None
    with open(tmp_path / "r" / "private" / "lock", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as Run.busy does, for longer
        threading.Timer(0.1, fcntl.flock, (file, fcntl.LOCK_UN)).start()
        with Run(tmp_path / "r").lock():
            pass
        fcntl.flock(file, fcntl.LOCK_SH)
        with pytest.raises(RunError, match="another process"):
            Run(tmp_path / "r").open_for_writing()
