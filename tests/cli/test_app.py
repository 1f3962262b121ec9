"""The command line as a user meets it: every wrong input is one clear message, before anything is written."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dpsyngen.cli.app import main
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.training.run import Run
from tests.conftest import tiny_arrays
from tests.forked import Forked


@pytest.fixture
def data(tmp_path, tiny_images) -> Path:
    images, labels = tiny_images()
    np.savez(tmp_path / "d.npz", images=images, labels=labels)
    return tmp_path / "d.npz"


SMALL = [
    *("--network", "nano", "--public-steps", 2, "--steps", 4, "--batch", 12, "-k", 1, "--physical-batch", 8),
    *("--set", "public.batch=4", "--set", "sampling.steps=3"),
]


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['dpsyngen', '--help']\n"
        "from dpsyngen import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'sklearn', 'matplotlib', 'dp_accounting', 'pydantic', 'numba'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "HEAVY []" in out
    for command in ("train", "sample", "evaluate", "report", "plan", "programs"):
        assert command in out


@pytest.mark.slow
def test_the_whole_job(call, data, tmp_path) -> None:
    run = tmp_path / "runs" / "a"
    code, out, err = call("train", "--data", data, "--epsilon", 8, "--out", run, *SMALL)
    assert code == 0, err
    # Rounded up, as a bound must be.
    assert Ledger(Run(run).ledger_path).epsilon() <= float(out.split("ε = ")[1].split()[0]) <= 8
    assert "δ = 0.01" in out
    assert "noise multiplier" in err
    code, out, err = call("sample", run, "-n", 9, "--out", tmp_path / "synthetic", "--seed", 3)
    assert code == 0, err
    assert sorted(p.name for p in (tmp_path / "synthetic").iterdir()) == ["0", "1", "2", "about.json", "metadata.csv"]
    assert len(list((tmp_path / "synthetic" / "1").iterdir())) == 3
    assert json.loads((tmp_path / "synthetic" / "about.json").read_text())["seed"] == 3
    code, out, err = call("sample", run / "release", "-n", 4, "--out", tmp_path / "s.npz", "--classes", "2,0")
    assert code == 0, err
    stored = np.load(tmp_path / "s.npz")
    assert stored["labels"].tolist() == [2, 0, 2, 0]
    assert stored["images"].shape == (4, 1, 8, 8)
    code, out, err = call(
        *("evaluate", run, "--data", data, "--test", data, "-n", 60),
        *("--features", "pixels-pca", "--classifiers", "logreg"),
    )
    assert code == 0, err
    assert "CAS, logreg" in out
    assert "PRIVATE figures" in out
    assert (run / "private" / "metrics.json").exists()
    assert not list((run / "release").glob("*metrics*"))
    code, out, err = call("report", run)
    assert code == 0, err
    assert (run / "release" / "report.html").exists()
    # Nothing is overwritten.
    for again in (
        ("train", "--data", data, "--epsilon", 8, "--out", run, *SMALL),
        ("sample", run, "--out", tmp_path / "synthetic"),
        ("sample", run, "--out", tmp_path / "s.npz"),
    ):
        code, out, err = call(*again)
        assert code == 2
        assert "exists already" in err


@pytest.mark.slow
def test_written_samples_can_be_read_as_data(call, finished, tmp_path) -> None:
    assert call("sample", finished.path, "-n", 30, "--out", tmp_path / "syn")[0] == 0
    assert call("sample", finished.path, "-n", 30, "--out", tmp_path / "syn.npz")[0] == 0
    from dpsyngen.data import load_images

    folder, file = load_images(tmp_path / "syn"), load_images(tmp_path / "syn.npz")
    assert folder.class_names == file.class_names == ("0", "1", "2")
    assert len(folder) == len(file) == 30


@pytest.mark.slow
def test_plan_states_both_ways(call) -> None:
    code, out, _ = call("plan", "--records", 60000, "--epsilon", 1, "--batch", 4096, "--steps", 2000)
    assert code == 0
    asked = next(line for line in out.splitlines() if "asked" in line).split()
    assert float(asked[4]) == pytest.approx(11.446, abs=0.01)
    code, out, _ = call("plan", "--records", 60000, "--noise", 11.45, "--batch", 4096, "--steps", 2000)
    asked = next(line for line in out.splitlines() if "asked" in line).split()
    assert float(asked[5]) == pytest.approx(1.0, abs=0.001)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """A command of 30 reproducible steps, without its --out, and the run of one that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    images, labels = tiny_arrays()
    np.savez(folder / "d.npz", images=images, labels=labels)
    command = ["train", "--data", folder / "d.npz", "--epsilon", 8, "--variant", "cleaning", "--insecure-seed", 5]
    command += [*SMALL, "--steps", 30, "--set", "private.checkpoint_every=3"]
    # With one thread, as the interrupted processes have: sums over another number of cores round otherwise.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dpsyngen", *map(str, command), "--out", str(folder / "r")])
        with contextlib.suppress(SystemExit):
            main()
    assert (folder / "r" / "release" / "generator.json").exists()
    return list(map(str, command)), folder / "r"


@pytest.mark.slow
@pytest.mark.xdist_group("forked")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_process_resumes_to_the_same_weights(kind, call, whole, tmp_path) -> None:
    """A real process, really interrupted in the middle of DP-SGD, then `--resume`."""
    base, uninterrupted = whole
    out = tmp_path / "pieces"
    process = Forked(tmp_path, "dpsyngen", *base, "--out", out)
    log = out / "private" / "training.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= 7):
        assert process.process.is_alive(), process.err
        time.sleep(0.02)
    process.send(kind)
    ended = process.code()
    assert not (out / "release" / "generator.json").exists()
    assert "Traceback" not in process.err
    if kind == signal.SIGKILL:
        assert ended == -signal.SIGKILL
    else:
        assert ended == 130
        assert "continue with: dpsyngen train --resume" in process.err
    code, printed, err = call("sample", out, "--out", tmp_path / "s")
    assert code == 2
    assert "--resume" in err
    code, printed, err = call("train", "--resume", "--out", out)
    assert code == 0, err
    assert "NOT PRIVATE" in printed
    for network in ("cleaning", "context"):
        name = f"release/weights/{network}.safetensors"
        assert (out / name).read_bytes() == (uninterrupted / name).read_bytes()


def test_full_disk_is_one_message(call, data, tmp_path, monkeypatch) -> None:
    import dpsyngen.training.checkpoint as checkpoint_module

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "save_file", full)
    arguments = ("--set", "private.checkpoint_every=2", "--variant", "dpdm")
    code, _, err = call("train", "--data", data, "--epsilon", 8, "--out", tmp_path / "r", *SMALL, *arguments)
    assert code == 1
    assert "the disk is full" in err
    monkeypatch.undo()
    assert call("train", "--resume", "--out", tmp_path / "r")[0] == 0
