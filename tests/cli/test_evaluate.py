"""`dpsyngen evaluate` on whole runs: its options, what it writes, and what it refuses before anything is spent."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest

import dpsyngen
from dpsyngen import fit as api
from dpsyngen.errors import ConfigError, DataError
from dpsyngen.evaluation import FeatureSpec
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.programs import make_program
from dpsyngen.training.run import Run

pytestmark = pytest.mark.slow

SETTINGS = {
    "network": {"size": "nano"},
    "public": {"steps": 3, "batch": 4, "copies": 1},
    "private": {"steps": 6, "batch": 12, "copies": 1, "physical_batch": 12, "checkpoint_every": 2},
    "sampling": {"steps": 3},
}
QUICK = ("--classifiers", "", "--features", "pixels-pca")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on data.npz, with test.npz and features of one's own beside it."""
    folder = tmp_path_factory.mktemp("trained")
    for name, seed in (("data", 0), ("test", 1)):
        images = np.random.default_rng(seed).integers(0, 256, (60, 8, 8), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", images=images, labels=np.arange(60) % 3)
    (folder / "own.py").write_text(
        "from torch import nn\nflat = nn.Flatten()\n\ndef wrong(images):\n    return images\n"
    )
    api.train(folder / "data.npz", epsilon=8, out=folder / "run", settings=SETTINGS)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Run:
    shutil.copytree(trained / "run", tmp_path / "run")
    return Run(tmp_path / "run")


def kept(run: Run) -> dict:
    return json.loads((run.private / "metrics.json").read_text())


def test_figures_bounds_and_intervals(call, run, trained) -> None:
    code, out, err = call("evaluate", run.path, "--test", trained / "test.npz", "-n", 50, *QUICK, "--bootstrap", 60)
    assert code == 0, err
    assert "PRIVATE figures" in out
    line = next(line for line in out.splitlines() if line.startswith("Fréchet distance, pixels-pca"))
    assert all(word in line for word in ("95 %", "floor", "ceiling", "lower is better", "50 generated against 60 real"))
    figure = kept(run)["features"]["pixels-pca"]
    assert (figure["floor_images"], figure["ceiling_images"]) == (50, 50)
    assert figure["interval"]["replicates"] == 60
    entry = Ledger(run.ledger_path).entries[-1]
    assert entry.kind == "private"
    assert "sliced-wasserstein" in str(entry.details)


def test_a_test_set_without_a_class(call, run, trained, tmp_path) -> None:
    images = np.random.default_rng(2).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "test.npz", images=images, labels=np.arange(40) % 2 * 2)  # none of class 1
    options = ("-n", 60, "--classifiers", "logreg", "--features", "pixels-pca", "--bootstrap", 0)
    code, out, err = call("evaluate", run.path, "--test", tmp_path / "test.npz", *options)
    assert code == 0, err
    assert "no test image is of '1'" in out
    found = kept(run)
    assert "no test image is of '1'" in found["notes"][0]
    accuracy = found["cas"]["logreg"]["per_class_accuracy"]
    assert accuracy[1] is None
    assert None not in (accuracy[0], accuracy[2])
    dpsyngen.write_report(run)
    assert "no test image is of" in (run.private / "report.html").read_text()
    np.savez(tmp_path / "test.npz", images=images, labels=np.arange(40) % 4)
    code, _, err = call("evaluate", run.path, "--test", tmp_path / "test.npz", *options)
    assert (code, "not among them: '3'" in err) == (2, True)


def test_the_ceiling_is_the_runs_own_program(run, monkeypatch) -> None:
    seen = []
    from dpsyngen.evaluation import run as evaluation

    monkeypatch.setattr(
        evaluation,
        "evaluate_images",
        lambda *a, **k: seen.append(k["programs"]) or {"features": {}, "cas": {}, "notes": []},
    )
    dpsyngen.evaluate(run, images=20, classifiers=())
    p = run.config.program
    program = make_program(p.name, resolution=8, channels=1, seed=p.seed, **p.params)
    np.testing.assert_array_equal(seen[0], program.batch(range(20)))


def test_metrics_own_features_and_no_bootstrap(call, run, trained) -> None:
    own = f"{trained}/own.py:flat"
    code, out, err = call(
        *("evaluate", run.path, "-n", 20, "--classifiers", "", "--features", own),
        *("--metrics", "precision,kid", "--bootstrap", 0, "--max-images", 15),
    )
    assert code == 0, err
    figure = kept(run)["features"][own]
    assert set(figure["metrics"]) == {"kid", "precision"}
    assert figure["metrics"]["kid"]["low"] is None
    assert figure["generated_images"] == figure["real_images"] == 15
    assert len(figure["config"]["sha256"]) == 64
    assert "95 %" not in out
    # Real images' features stay in the private half, for the owner alone.
    files = list((run.private / "features").iterdir())
    assert len(files) == 2
    assert all(stat.S_IMODE(f.stat().st_mode) == 0o600 for f in files)
    assert not [f for f in run.release.rglob("*") if f.suffix == ".npz"]
    # What a killed evaluation left there is removed by the next.
    (run.private / "features" / ".abc.npz.a1b2c3d4.dpsyngen-tmp").write_bytes(b"piece")
    assert call("evaluate", run.path, "-n", 20, "--classifiers", "", "--features", own)[0] == 0
    assert sorted((run.private / "features").glob("*.npz")) == sorted((run.private / "features").iterdir())
    shutil.rmtree(run.private / "features")
    assert call("evaluate", run.path, "-n", 20, "--classifiers", "", "--features", own, "--no-cache")[0] == 0
    assert not (run.private / "features").exists()


def test_wrong_features_of_ones_own_cost_nothing(call, run, trained) -> None:
    entries = run.ledger_path.read_bytes()
    for options, message in (
        (("--features", "vibes"), "or your own, given as"),
        (("--features", f"{trained}/own.py:gone"), "has nothing called 'gone'"),
        (("--features", f"{trained}/own.py:wrong"), "must return [2, d]"),
        (("--features", f"{trained}/missing.py:f"), "no such file"),
    ):
        code, _, err = call("evaluate", run.path, "-n", 20, *options)
        assert code == 2, err
        assert message in err
    with pytest.raises(ConfigError, match=r"metrix: there is no such setting \(did you mean metrics"):
        dpsyngen.evaluate(run, metrix=["kid"])
    assert run.ledger_path.read_bytes() == entries
    assert not (run.private / "metrics.json").exists()


def test_features_are_names_or_specs_with_weights_of_their_own(run, tmp_path) -> None:
    few = {"images": 20, "classifiers": (), "metrics": ["frechet"], "bootstrap": 0}
    found = dpsyngen.evaluate(run, features=[FeatureSpec("pixels-pca")], **few)
    assert list(found["features"]) == ["pixels-pca"]
    own = FeatureSpec("inception", tmp_path / "own.pth")
    with pytest.raises(DataError, match=r"own\.pth does not hold the weights"):
        dpsyngen.evaluate(run, features=[own], **few)
    for inception in ("inception", FeatureSpec("inception")):
        with pytest.raises(DataError, match=r"given\.pth does not hold the weights"):
            dpsyngen.evaluate(run, features=[inception], inception_weights=tmp_path / "given.pth", **few)
    with pytest.raises(ConfigError, match="left out without the features inception"):
        dpsyngen.evaluate(run, features=[own], inception_weights=tmp_path / "given.pth", **few)


def test_the_runs_images_are_those_that_it_was_trained_on(call, trained, tmp_path, monkeypatch) -> None:
    """By what they are: the same in another place and from another folder, others in their place are refused."""
    for name in ("data", "test"):
        shutil.copy(trained / f"{name}.npz", tmp_path)
    monkeypatch.chdir(tmp_path)
    api.train("data.npz", epsilon=8, out="run", settings=SETTINGS)
    run, quick = Run(tmp_path / "run"), (*QUICK, "-n", 20, "--bootstrap", 0)
    assert run.config.data.source == str(tmp_path / "data.npz")
    (tmp_path / "elsewhere").mkdir()
    shutil.copy("test.npz", tmp_path / "elsewhere" / "data.npz")
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, _, err = call("evaluate", run.path, *quick)
    assert code == 0, err
    assert not any("trained on" in note for note in kept(run)["notes"])
    shutil.copy(trained / "data.npz", tmp_path / "moved.npz")
    assert call("evaluate", run.path, "--data", tmp_path / "moved.npz", *quick)[0] == 0
    assert not any("trained on" in note for note in kept(run)["notes"])
    (tmp_path / "data.npz").unlink()
    assert "if they have moved, say where with --data" in call("evaluate", run.path, *quick)[2]
    shutil.copy(trained / "test.npz", tmp_path / "data.npz")
    before, entries = kept(run), len(Ledger(run.ledger_path).entries)
    code, _, err = call("evaluate", run.path, *quick)
    assert code == 2
    assert "not those that" in err
    assert (kept(run), len(Ledger(run.ledger_path).entries)) == (before, entries)
    assert call("evaluate", run.path, "--data", "data.npz", *quick)[0] == 0
    assert any("not those that the run was trained on" in note for note in kept(run)["notes"])
    digest = json.loads(run.data_path.read_text())["fingerprint"].encode()
    for path in run.release.rglob("*"):
        assert path.is_dir() or not (digest in path.read_bytes() or str(tmp_path).encode() in path.read_bytes())


def test_test_images_that_were_trained_on_are_told_of(call, run, trained, tmp_path) -> None:
    shutil.copy(trained / "data.npz", tmp_path / "held-out.npz")
    code, out, err = call("evaluate", run.path, "--test", tmp_path / "held-out.npz", *QUICK, "-n", 20, "--bootstrap", 0)
    assert code == 0, err
    assert any("the test images are the training images" in note for note in kept(run)["notes"])
    assert "the test images are the training images" in out


def test_images_of_another_size_are_told_of_and_of_another_colour_refused(call, run, trained, tmp_path) -> None:
    rng, labels = np.random.default_rng(3), np.arange(40) % 3
    np.savez(tmp_path / "large.npz", images=rng.integers(0, 256, (40, 12, 12), dtype=np.uint8), labels=labels)
    np.savez(tmp_path / "rgb.npz", images=rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8), labels=labels)
    options = (*QUICK, "-n", 20, "--bootstrap", 0)
    code, _, err = call("evaluate", run.path, "--test", tmp_path / "large.npz", *options)
    assert code == 0, err
    assert "the test images have 12 pixels a side, and those of the run 8: they were resized" in kept(run)["notes"]
    before, entries = kept(run), len(Ledger(run.ledger_path).entries)
    for option in ("--test", "--data"):
        code, _, err = call("evaluate", run.path, option, tmp_path / "rgb.npz", *options)
        assert code == 2
        assert "images are rgb, but those of the run grey" in err
    code, _, err = call("memorisation", run.path, "--held-out", tmp_path / "large.npz", "-n", 20)
    assert code == 2
    assert "the held-out images have 12 pixels a side" in err
    assert (kept(run), len(Ledger(run.ledger_path).entries)) == (before, entries)


def test_too_few_images_of_a_class_for_a_classifier_cost_nothing(call, run, trained) -> None:
    entries = len(Ledger(run.ledger_path).entries)
    code, _, err = call("evaluate", run.path, "--test", trained / "test.npz", "-n", 15, "--classifiers", "logreg")
    assert code == 2
    assert "15 generated images of 3 classes are too few to train a classifier" in err
    assert len(Ledger(run.ledger_path).entries) == entries


def test_labels_of_no_images_are_refused(call, run, trained) -> None:
    code, _, err = call("evaluate", run.path, "--labels", trained / "t.csv", *QUICK)
    assert code == 2
    assert "left out without data or test" in err
