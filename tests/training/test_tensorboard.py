"""Event files: what a reader finds in them, resumes, modes, and what happens when they cannot be written."""

from __future__ import annotations

import builtins
import io
import math
import stat
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from dpsyngen import fit as api
from dpsyngen.errors import ConfigError
from dpsyngen.training.log import OnEvent, TensorBoard, Warned
from dpsyngen.training.pipeline import Training
from tests.training.test_step_log import begin as begin_run
from tests.training.test_step_log import clock, finish

pytestmark = pytest.mark.slow


def begin(settings: dict, out: Path, data: Any, **sections: dict) -> Training:
    logging = {"tensorboard": True, **sections.pop("logging", {})}
    return begin_run(settings, out, data, logging=logging, **{"stages": {"variant": "cleaning"}, **sections})


def kept(warnings: list[str]) -> OnEvent:
    return lambda event: warnings.append(event.text) if isinstance(event, Warned) else None


def events(folder: Path) -> dict[tuple[str, int], Any]:
    """(tag, step) -> value, read as TensorBoard does: files by name, a START forgets its step and what is after it.

    A record is: length (8 bytes), its checksum (4), content, its checksum (4).
    """
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    out: dict[tuple[str, int], Any] = {}
    for path in sorted(folder.glob("*tfevents*")):
        data = path.read_bytes()
        while len(data) >= 12 and len(data) >= 16 + struct.unpack("<Q", data[:8])[0]:
            size = struct.unpack("<Q", data[:8])[0]
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                out = {key: value for key, value in out.items() if key[1] < event.step}
            for value in event.summary.value:
                key = (value.tag, event.step)
                assert key not in out, f"{key} is there twice"
                out[key] = value.simple_value
    return out


def column(found: dict[tuple[str, int], Any], tag: str) -> dict[int, Any]:
    return {step: value for (name, step), value in found.items() if name == tag}


def test_events_are_the_figures_of_the_logs(tmp_path, tiny_settings, tiny_images) -> None:
    training = finish(begin(tiny_settings, tmp_path / "r", tiny_images()))
    folder = training.run.private / "tensorboard"
    assert {p.name for p in folder.iterdir()} == {"cleaning", "context"}
    private, times = events(folder / "context"), clock(training.run)
    for tag in ("loss", "clipped", "median_norm", "noise_to_signal", "epsilon", "learning_rate"):
        logged = {line["step"]: line[tag] for line in training.private_log.read()}
        assert column(private, tag) == pytest.approx(logged), tag
    assert column(private, "seconds") == pytest.approx(
        {line["step"]: line["seconds"] for line in times if line["phase"] == "context"}
    )
    public = events(folder / "cleaning")
    assert column(public, "loss") == pytest.approx({v["step"]: v["loss"] for v in training.public_log.read()})
    # All of it in the private half, for its owner alone.
    for path in [folder, *folder.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert not list(training.run.release.rglob("*tfevents*"))


def test_resumed_session_makes_the_reader_forget_repeated_steps(tmp_path, tiny_settings, tiny_images) -> None:
    training = begin(tiny_settings, tmp_path / "r", tiny_images())
    for report in training.steps():
        if report.phase == "context" and report.step == 5:
            break  # killed; the checkpoint is of step 4, so step 5 is repeated
    folder = training.run.private / "tensorboard" / "context"
    assert max(column(events(folder), "loss")) <= 5
    del training
    # A torn record, as a kill in the middle of a write leaves.
    with next(iter(folder.iterdir())).open("ab") as f:
        f.write(b"\x10\x00\x00")
    training = finish(api.prepare_resume(tmp_path / "r", tiny_images()))
    assert len(list(folder.iterdir())) == 2
    found = events(folder)  # which says so if a step is there twice
    logged = {line["step"]: line["loss"] for line in training.private_log.read()}
    assert column(found, "loss") == pytest.approx(logged)


def test_a_session_can_turn_it_on_or_off(tmp_path, tiny_settings, tiny_images) -> None:
    """It does not change what a step is, so it is no setting that a resumed run must share with its beginning."""
    settings = {**tiny_settings}
    training = begin(settings, tmp_path / "r", tiny_images(), logging={"tensorboard": False})
    for report in training.steps():
        if report.phase == "context" and report.step == 2:
            training.stop_requested = True
    assert not (training.run.private / "tensorboard").exists()
    del training
    run = finish(api.prepare_resume(tmp_path / "r", tiny_images(), tensorboard=True)).run
    assert list(column(events(run.private / "tensorboard" / "context"), "loss")) == [3, 4, 5, 6]


def test_full_disk_gives_up_the_curves_and_not_the_training(tmp_path, tiny_settings, tiny_images, monkeypatch) -> None:
    whole = finish(begin(tiny_settings, tmp_path / "whole", tiny_images()))
    real_open = builtins.open
    writes = 0

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            nonlocal writes
            writes += 1
            if writes > 40:
                raise OSError(28, "No space left on device")
            return super().write(data)

    def opened(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        return Full(file, "w") if "tfevents" in str(file) and "w" in mode else real_open(file, mode, *rest, **options)

    warnings: list[str] = []
    training = begin(tiny_settings, tmp_path / "r", tiny_images(), on_event=kept(warnings))
    monkeypatch.setattr(builtins, "open", opened)
    finish(training)
    assert writes > 40
    assert 1 <= len(warnings) <= 2  # one a phase
    assert "No space left" in warnings[0]
    assert "training.jsonl has the same figures" in warnings[0]
    for path in whole.run.release.rglob("*"):
        if path.is_file():
            assert (training.run.release / path.relative_to(whole.run.release)).read_bytes() == path.read_bytes()
    assert training.private_log.path.read_bytes() == whole.private_log.path.read_bytes()


def test_folder_that_cannot_be_made_is_a_warning(tmp_path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    warnings: list[str] = []
    board = TensorBoard(tmp_path, "context", 0, kept(warnings))
    board.scalars(1, {"loss": 1.0})
    board.close()
    assert len(warnings) == 1


def test_missing_package_is_said_before_anything_is_made(tmp_path, tiny_settings, tiny_images, monkeypatch) -> None:
    monkeypatch.setattr("dpsyngen.errors.find_spec", lambda name: None if name == "tensorboardX" else object())
    with pytest.raises(ConfigError, match=r"pip install 'dpsyngen\[tensorboard\]'"):
        begin(tiny_settings, tmp_path / "r", tiny_images())
    assert not (tmp_path / "r").exists()
    # Nobody else needs it.
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    finish(begin(tiny_settings, tmp_path / "r", tiny_images(), logging={"tensorboard": False}))


def test_not_finite_figures_are_left_out(tmp_path) -> None:
    board = TensorBoard(tmp_path, "context", 0, pytest.fail)
    board.scalars(1, {"loss": math.nan, "epsilon": math.inf, "clipped": 0.5})
    board.close()
    assert events(tmp_path / "tensorboard" / "context") == {("clipped", 1): 0.5}
