"""The command line as a user meets it: every wrong input is one clear message, before anything is written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest


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


def test_the_whole_job(call, data, tmp_path) -> None:
    run = tmp_path / "runs" / "a"
    code, out, err = call("train", "--data", data, "--epsilon", 8, "--out", run, *SMALL)
    assert code == 0, err
    assert "ε = 7." in out or "ε = 8.0000" in out
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


def test_written_samples_can_be_read_as_data(call, data, tmp_path) -> None:
    run = tmp_path / "r"
    assert call("train", "--data", data, "--epsilon", 8, "--out", run, *SMALL)[0] == 0
    assert call("sample", run, "-n", 30, "--out", tmp_path / "syn")[0] == 0
    assert call("sample", run, "-n", 30, "--out", tmp_path / "syn.npz")[0] == 0
    from dpsyngen.data import load_images

    folder, file = load_images(tmp_path / "syn"), load_images(tmp_path / "syn.npz")
    assert folder.class_names == file.class_names == ("0", "1", "2")
    assert len(folder) == len(file) == 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epsilon", "0"], "privacy.epsilon is 0"),
        (["--epsilon", "-1"], "privacy.epsilon is -1"),
        (["--epsilon", "lots"], "must be a positive number, or inf"),
        (["--epsilon", "nan"], "privacy.epsilon is nan"),
        (["--epsilon", "1", "--delta", "0.5"], "must be below 1/records"),
        (["--epsilon", "1", "--delta", "0"], "privacy.delta is 0"),
        (["--epsilon", "1", "--batch", "61"], "only 60 records"),
        (["--epsilon", "1", "--variant", "sideways"], "'both', 'gaussian', 'residual' or 'residual-cleaning'"),
        (["--epsilon", "1", "--tau-cleaning", "2", "--tau-coarse", "1"], "must be below stages.tau_coarse"),
        (["--epsilon", "1", "--networks", "one"], "'experts' or 'shared'"),
        (["--epsilon", "1", "--network", "gigantic"], "nano, tiny, small"),
        (["--epsilon", "1", "--preset", "fast"], "preset is 'fast'"),
        (["--epsilon", "1", "--config", "missing.yaml"], "cannot be read"),
        (["--epsilon", "1", "--program", "leaves"], "dead-leaves"),
        (["--epsilon", "1", "--steps", "0"], "private.steps is 0"),
        (["--epsilon", "1", "--public-steps", "0"], "public.steps is 0"),
        (["--epsilon", "1", "-k", "0"], "private.copies is 0"),
        (["--epsilon", "1", "--clip", "0"], "privacy.clipping_norm is 0"),
        (["--epsilon", "1", "--lr", "-1"], "private.learning_rate is -1"),
        (["--epsilon", "1", "--physical-batch", "0"], "private.physical_batch is 0"),
        (["--epsilon", "1", "--resolution", "7"], "data.resolution is 7"),
        (["--epsilon", "1", "--resolution", "9", "--network", "tiny"], "multiple of 4"),
        (["--epsilon", "1", "--channels", "blue"], "'auto', 'grey' or 'rgb'"),
        (["--epsilon", "1", "--records", "0"], "data.records is 0"),
        (["--epsilon", "1", "--set", "private.beta3=1"], "did you mean beta"),
        (["--epsilon", "1", "--set", "nonsense"], "section.name=value"),
        (["--epsilon", "1", "--device", "abacus"], "must be auto or cpu"),
        (["--epsilon", "1", "--device", "cpu", "--set", "compute.precision=tf32"], "the CPU has fp32, bf16 only"),
        (["--epsilon", "1", "--variant", "finetune", "--no-pretrain"], "choose 'dpdm'"),
        ([], "--epsilon is missing"),
    ],
)
def test_bad_options_of_train(call, data, tmp_path, arguments, message) -> None:
    code, _, err = call("train", "--data", data, "--out", tmp_path / "r", *SMALL, *arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "r").exists()


def test_missing_data_is_said(call, tmp_path) -> None:
    code, _, err = call("train", "--epsilon", 1, "--out", tmp_path / "r")
    assert code == 2
    assert "--data is missing" in err
    code, _, err = call("train", "--data", tmp_path / "nowhere", "--epsilon", 1, "--out", tmp_path / "r")
    assert code == 2
    assert "nowhere" in err


def test_resume_takes_no_new_settings(call, data, tmp_path) -> None:
    code, _, err = call("train", "--resume", "--out", tmp_path, "--epsilon", 3)
    assert code == 2
    assert "continues with the settings" in err
    code, _, err = call("train", "--resume", "--out", tmp_path / "none")
    assert code == 2
    assert "not a folder" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "0"], "-n is 0"),
        (["--sampler", "magic"], "ddim, heun, dpmpp"),
        (["--steps", "0"], "sampler steps is 0"),
        (["--guidance", "-1"], "guidance is -1"),
        (["--churn", "5"], "churn needs the sampler 'heun'"),
        (["--classes", "9"], "no class '9'"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--device", "abacus"], "must be auto or cpu"),
    ],
)
def test_bad_options_of_sample(call, data, tmp_path, arguments, message) -> None:
    run = tmp_path / "r"
    assert call("train", "--data", data, "--epsilon", 8, "--variant", "dpdm", "--out", run, *SMALL)[0] == 0
    code, _, err = call("sample", run, "--out", tmp_path / "s", *arguments)
    assert code == 2
    assert message in err
    assert not (tmp_path / "s").exists()


def test_bad_options_of_evaluate(call, data, tmp_path, tiny_images) -> None:
    run = tmp_path / "r"
    assert call("train", "--data", data, "--epsilon", 8, "--variant", "dpdm", "--out", run, *SMALL)[0] == 0
    entries = (run / "private" / "ledger.jsonl").read_text()
    other = tmp_path / "o.npz"
    images, labels = tiny_images(n=60, classes=2)
    np.savez(other, images=images, labels=labels)
    for arguments, message in (
        (["--features", "vibes"], "pixels-pca, efficientnet-lite0, inception"),
        (["--classifiers", "oracle"], "logreg, mlp, cnn"),
        (["--test", other], "classes 0, 1"),
        (["--data", tmp_path / "gone"], "gone"),
        (["-n", "0"], "at least 1"),
    ):
        code, _, err = call("evaluate", run, *arguments)
        assert code == 2, err
        assert message in err
    assert (run / "private" / "ledger.jsonl").read_text() == entries


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--records", 1000], "give one of --epsilon"),
        (["--records", 1000, "--epsilon", 1, "--noise", 1], "give one of --epsilon"),
        (["--records", 0, "--epsilon", 1], "at least 1"),
        (["--records", 100, "--epsilon", 1, "--batch", 101], "only 100 records"),
        (["--records", 100, "--epsilon", -1, "--batch", 10], "must be a positive number"),
        (["--records", 100, "--epsilon", 1, "--batch", 10, "--delta", 0.5], "below 1/records"),
        (["--records", 100, "--noise", 0, "--batch", 10], "must be a positive number"),
    ],
)
def test_bad_options_of_plan(call, arguments, message) -> None:
    code, _, err = call("plan", *arguments)
    assert code == 2
    assert message in err


def test_plan_states_both_ways(call) -> None:
    code, out, _ = call("plan", "--records", 60000, "--epsilon", 1, "--batch", 4096, "--steps", 2000)
    assert code == 0
    asked = next(line for line in out.splitlines() if "asked" in line).split()
    assert float(asked[4]) == pytest.approx(11.446, abs=0.01)
    code, out, _ = call("plan", "--records", 60000, "--noise", 11.45, "--batch", 4096, "--steps", 2000)
    asked = next(line for line in out.splitlines() if "asked" in line).split()
    assert float(asked[5]) == pytest.approx(1.0, abs=0.001)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_process_resumes_to_the_same_weights(kind, call, data, tmp_path) -> None:
    """A real process, really interrupted in the middle of DP-SGD, then `--resume`."""
    settings = [*SMALL[:-4], "--set", "public.batch=4", "--set", "private.checkpoint_every=3", "--insecure-seed", 5]
    settings[settings.index("--steps") + 1] = 40
    base = ["train", "--data", str(data), "--epsilon", "8", "--variant", "cleaning"]
    assert call(*base, "--out", tmp_path / "whole", *settings)[0] == 0
    out = tmp_path / "pieces"
    command = [sys.executable, "-m", "dpsyngen", *base, "--out", str(out), *map(str, settings)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = out / "private" / "training.jsonl"
    for _ in range(1200):
        if log.exists() and len(log.read_text().splitlines()) >= 7:
            break
        time.sleep(0.05)
    process.send_signal(kind)
    stdout, stderr = process.communicate(timeout=60)
    assert not (out / "release" / "generator.json").exists()
    assert "Traceback" not in stderr
    if kind != signal.SIGKILL:
        assert process.returncode == 130
        assert "continue with: dpsyngen train --resume" in stdout
    code, printed, err = call("sample", out, "--out", tmp_path / "s")
    assert code == 2
    assert "--resume" in err
    code, printed, err = call("train", "--resume", "--out", out)
    assert code == 0, err
    assert "NOT PRIVATE" in printed
    for network in ("cleaning", "context"):
        name = f"release/weights/{network}.safetensors"
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


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
