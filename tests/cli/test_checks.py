"""`dpsyngen memorisation` and `dpsyngen doctor` on whole runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from dpsyngen import fit as api
from dpsyngen.config import load_config
from dpsyngen.data import load_images
from dpsyngen.errors import ConfigError, DataError, RunError
from dpsyngen.evaluation.doctor import diagnose
from dpsyngen.evaluation.run import check_memorisation
from dpsyngen.generator.generator import ReleasedGenerator
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.training.health import assess
from dpsyngen.training.run import Run

pytestmark = pytest.mark.slow

SETTINGS = {
    "preset": "paper-cpu",
    "network": {"size": "nano"},
    "public": {"steps": 3, "batch": 4, "copies": 1},
    "private": {"steps": 6, "batch": 12, "copies": 1, "physical_batch": 12, "checkpoint_every": 2},
    "sampling": {"steps": 3},
}


def images_of(seed: int, n: int = 60) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 8, 8), dtype=np.uint8), (np.arange(n) % 3).astype(np.int64)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on data.npz, with held-out.npz beside it."""
    folder = tmp_path_factory.mktemp("trained")
    for name, seed in (("data", 0), ("held-out", 1)):
        images, labels = images_of(seed)
        np.savez(folder / f"{name}.npz", images=images, labels=labels)
    api.train(folder / "data.npz", epsilon=8, out=folder / "run", settings=SETTINGS)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Run:
    """A copy of that run, to be damaged."""
    shutil.copytree(trained / "run", tmp_path / "run")
    return Run(tmp_path / "run")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def codes(findings: list) -> dict[str, str]:
    return {f.code: f.severity for f in findings}


# ------------------------------------------------------------------------------------------ memorisation


def test_memorisation_without_its_features_costs_nothing(run, monkeypatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("pooch.retrieve", refuse)
    before = run.ledger_path.read_bytes()
    with pytest.raises(DataError, match="could not be downloaded"):
        check_memorisation(run, images=4, features=["inception"])
    assert run.ledger_path.read_bytes() == before


def test_memorisation_stays_in_the_private_half(call, run, trained) -> None:
    before = bytes_of(run.release)
    code, out, err = call("memorisation", run.path, "--held-out", trained / "held-out.npz", "-n", 60)
    assert code == 0, err
    assert "No sign of memorisation" in out
    assert "PRIVATE figures and pictures" in out
    assert bytes_of(run.release) == before
    for name in ("memorisation.json", "memorisation_pairs.json"):
        assert (run.private / name).stat().st_mode & 0o777 == 0o600
    figures = json.loads((run.private / "memorisation.json").read_text())
    assert figures["flagged"] is False
    assert figures["spaces"]["pixels"]["size"] == 60
    entry = Ledger(run.ledger_path).entries[-1]
    assert (entry.kind, entry.details["held_out_images"]) == ("private", 60)
    assert Ledger(run.ledger_path).epsilon() <= 8


def test_the_ledger_knows_before_private_images_are_looked_at(run, trained, monkeypatch) -> None:
    import dpsyngen.evaluation.run as module

    seen = []

    def looks(*arguments: object, **options: object) -> None:
        seen.extend(Ledger(run.ledger_path).entries)
        raise InterruptedError

    monkeypatch.setattr(module, "memorisation_check", looks)
    with pytest.raises(InterruptedError):
        check_memorisation(run, held_out=trained / "held-out.npz", images=4)
    assert seen[-1].kind == "private"
    assert "memorisation" in seen[-1].reason


def test_a_generator_of_training_images_is_flagged(call, run, trained, monkeypatch) -> None:
    from dpsyngen import Samples
    from dpsyngen.generator.generator import ReleasedGenerator

    images, labels = images_of(0)

    def copies(self: ReleasedGenerator, count: int, **settings: object) -> Samples:
        return Samples(images[:count, None], labels[:count], self.class_names, {})

    monkeypatch.setattr(ReleasedGenerator, "sample", copies)
    code, out, _ = call("memorisation", run.path, "--held-out", trained / "held-out.npz", "-n", 60)
    assert code == 0
    assert "Signs of memorisation: 60 generated images equal a training image in every pixel" in out


def test_without_held_out_images_the_check_says_what_it_cannot(call, run) -> None:
    code, out, _ = call("memorisation", run.path, "-n", 8)
    assert code == 0
    assert "Nothing can be concluded" in out
    assert "there are no held-out images" in out
    assert (run.private / "memorisation_pairs.json").exists()


def test_training_images_are_no_control(call, run, trained, tmp_path) -> None:
    shutil.copy(trained / "data.npz", tmp_path / "data.npz")
    code, _, err = call("memorisation", run.path, "--held-out", tmp_path / "data.npz")
    assert code == 2
    assert "no control" in err
    assert not (run.private / "memorisation.json").exists()
    # The comparison itself refuses them, so the access is in the ledger.
    assert sum(e.kind == "private" for e in Ledger(run.ledger_path).entries) == 1


def test_arrays_have_to_be_given_again(tmp_path) -> None:
    run = api.train(images_of(0), epsilon=float("inf"), out=tmp_path / "r", settings=SETTINGS)
    with pytest.raises(ConfigError, match="arrays in memory"):
        check_memorisation(run, images=4)
    with pytest.raises(DataError, match="not those"):
        check_memorisation(run, data=images_of(1), images=4)
    assert check_memorisation(run, data=images_of(0), held_out=images_of(1), images=30).flagged is False
    (run.data_path).unlink()
    with pytest.raises(RunError, match=r"data\.json, which says what images the run is of, cannot be read"):
        check_memorisation(run, data=images_of(0), images=4)


def test_unlabelled_images(tmp_path) -> None:
    images, other = images_of(0)[0], images_of(1)[0]
    run = api.train((images, None), epsilon=float("inf"), out=tmp_path / "r", settings=SETTINGS)
    result = check_memorisation(run, data=(images, None), held_out=(other, None), images=30)
    assert result.flagged is False


# ------------------------------------------------------------------------------------------------ doctor


def test_doctor_of_a_finished_run(call, run) -> None:
    """Six steps on noise: there is something to say, and nothing private is said about images."""
    before = bytes_of(run.release)
    code, out, err = call("doctor", run.path)
    assert code == 5, err
    assert "finished" in out
    assert "whole" in out
    assert "ε = " in out
    assert "ERROR    noise-images" in out
    assert "WARNING  few-steps" in out
    assert out.index("ERROR") < out.index("WARNING")
    assert bytes_of(run.release) == before
    kept = run.private / "health.json"
    assert kept.stat().st_mode & 0o777 == 0o600
    assert json.loads(kept.read_text())["findings"] == [f.to_dict() for f in diagnose(run).findings]


def test_doctor_says_so_where_nothing_is_found(call, run, monkeypatch) -> None:
    import dpsyngen.evaluation.doctor as module

    monkeypatch.setattr(module, "assess", lambda run, release: [])
    code, out, _ = call("doctor", run.path)
    assert code == 0
    assert out.endswith("nothing found\n")


def test_doctor_reads_no_private_image(run, trained, monkeypatch) -> None:
    import dpsyngen.data.load as module

    def fails(*arguments: object, **options: object) -> None:
        raise AssertionError("private images were read")

    monkeypatch.setattr(module, "load_images", fails)
    entries = run.ledger_path.read_bytes()
    diagnose(run)
    assert run.ledger_path.read_bytes() == entries


def test_doctor_of_an_interrupted_run(call, tmp_path) -> None:
    config = load_config({**SETTINGS, "privacy": {"epsilon": 8}})
    training = api.prepare(config, tmp_path / "r", load_images(images_of(0)))
    private_steps = 0
    for progress in training.steps():
        private_steps += progress.phase == "context"
        if private_steps == 4:
            training.stop_requested = True
    _, out, _ = call("doctor", tmp_path / "r")
    assert "interrupted; continue with: dpsyngen train --resume --out" in out
    assert "phase 'context', step 4" in out
    assert "so far (target 8)" in out
    # Damage to the newer checkpoint leaves the older one.
    newest = training.run.private / "checkpoint.safetensors"
    newest.write_bytes(newest.read_bytes()[:-5])
    found = diagnose(training.run)
    assert codes(found.findings)["checkpoint-damaged"] == "warning"
    assert dict(found.state)["last checkpoint"].startswith("phase 'context', step 2")


def test_doctor_while_another_process_works(call, run) -> None:
    import fcntl

    (run.private / "health.json").unlink()  # training wrote it
    with open(run.private / "lock", "rb+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        _, out, _ = call("doctor", run.path)
        assert "another process is working on it" in out
        assert not (run.private / "health.json").exists()
    call("doctor", run.path)
    assert (run.private / "health.json").exists()


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda r: r.ledger_path.write_text(r.ledger_path.read_text().replace("dp-sgd", "dp-sgD")), "ledger-damaged"),
        (lambda r: r.ledger_path.unlink(), "ledger-damaged"),
        (lambda r: (r.private / "config.yaml").write_text("private: ["), "run-damaged"),
        (lambda r: r.randomness_path.write_text("{"), "file-damaged"),
        (lambda r: r.data_path.unlink(), "file-damaged"),
        (lambda r: r.weights("context").write_bytes(b"x"), "release-damaged"),
        (lambda r: (r.release / "generator.json").write_text("{}"), "release-damaged"),
        (lambda r: poison(r.weights("cleaning"), float("nan")), "release-damaged"),
        (lambda r: poison(r.weights("cleaning"), 1e30), "blank-images"),
    ],
)
def test_damage_is_an_error(call, run, damage, code) -> None:
    damage(run)
    exit_code, out, _ = call("doctor", run.path)
    assert exit_code == 5
    assert f"ERROR    {code}" in out


def poison(path: Path, value: float) -> None:
    weights = {k: v.clone() for k, v in load_file(path).items()}
    next(iter(weights.values())).view(-1)[0] = value
    save_file(weights, path)


def test_small_damage_is_a_warning(run) -> None:
    log = run.private / "training.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"loss"', b'"los', 1))
    run.private.chmod(0o750)
    findings = diagnose(run).findings
    severities = [f.severity for f in findings]
    assert set(severities) == {"error", "warning"}
    assert severities == sorted(severities, key=["error", "warning", "note"].index)
    found = codes(findings)
    assert found["log-damaged"] == found["private-half-open"] == "warning"
    log.write_text('{"phase": "context", "step": 1}\n')
    assert "few-steps" in codes(assess(run, ReleasedGenerator))


def test_health_is_written_at_the_end_of_training(run) -> None:
    findings = assess(run, ReleasedGenerator)
    kept = json.loads((run.private / "health.json").read_text())
    assert [f["code"] for f in kept["findings"]] == [f.code for f in findings]


def test_doctor_of_a_run_that_diverged(call, tmp_path) -> None:
    settings = {**SETTINGS, "private": {**SETTINGS["private"], "learning_rate": 1000, "steps": 10}}
    with pytest.raises(RunError, match="training was stopped"):
        api.train(images_of(0), epsilon=8, out=tmp_path / "r", settings=settings)
    code, out, _ = call("doctor", tmp_path / "r")
    assert code == 5
    assert "cannot be continued" in out
    assert "ERROR    weights-not-finite\n" in out
    assert "start a new run with a much lower learning rate, --lr" in out
    for command in (["sample", "--out", tmp_path / "s"], ["report"], ["memorisation"]):
        assert call(command[0], tmp_path / "r", *command[1:])[0] == 2
