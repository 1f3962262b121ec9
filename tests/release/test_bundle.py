"""What is packed, what never is, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import dpsyngen
import dpsyngen.privacy.noise as noise_module
import dpsyngen.training.moments as moments_module
from dpsyngen import fit as api
from dpsyngen.config import load_config
from dpsyngen.errors import ConfigError, LedgerError, ReleaseError, RunError
from dpsyngen.generator.samples import folder_names
from dpsyngen.privacy.accounting import Mechanism
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.release.bundle import MOST_SAMPLES, SMALL, pack
from dpsyngen.training.run import Run
from tests.conftest import TINY_SETTINGS, tiny_arrays


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as z:
        return {n: z.read(n) for n in z.namelist()}


def copy_of(run: Run, to: Path) -> Run:
    import shutil

    shutil.copytree(run.path, to)
    return Run(to)


def test_a_bundle_holds_the_release_and_nothing_else(finished, bundle) -> None:
    packed = contents(bundle)
    assert {n for n in packed if not n.startswith("samples/")} == {
        "PRIVACY.md",
        "README.md",
        "certificate.schema.json",
        "config.yaml",
        "denoiser/denoiser.py",
        "generator.json",
        "manifest.json",
        "model_index.json",
        "pipeline.py",
        "privacy.json",
        "public_training.jsonl",
        "report.html",
        "weights/cleaning.safetensors",
        "weights/coarse.safetensors",
        "weights/context.safetensors",
    }
    assert len([n for n in packed if n.endswith(".png")]) == 9
    files = json.loads(packed["manifest.json"])["files"]
    assert set(files) == set(packed) - {"manifest.json"}
    for name, entry in files.items():
        assert entry == {"bytes": len(packed[name]), "sha256": hashlib.sha256(packed[name]).hexdigest()}
    private = {p.name: p.read_bytes() for p in finished.private.iterdir() if p.is_file()}
    everything = b"\0".join(packed.values())
    assert not any(len(v) > 40 and v in everything for v in private.values())


def test_samples_are_drawn_as_the_sample_command_does(finished, bundle, tmp_path) -> None:
    import io

    from PIL import Image

    expected = dpsyngen.Generator(finished.release).sample(9, seed=5).images
    packed = contents(bundle)
    for i in range(9):
        name = next(n for n in packed if n.endswith(f"{i:07d}.png"))
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(packed[name]))), expected[i, 0])


def test_same_run_same_bytes(finished, bundle, tmp_path) -> None:
    again = pack(finished, tmp_path / "again.zip", samples=9, seed=5)
    assert again.path.read_bytes() == bundle.read_bytes()
    assert again.sha256 == hashlib.sha256(bundle.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("pair", "stages"),
    [
        ("neighbours", {"variant": "both", "pretrain": True}),
        ("strangers", {"variant": "both", "pretrain": True}),
        ("neighbours", {"variant": "residual", "tau_coarse": 1.0}),  # and of DP moments; the batch follows from n, too
    ],
)
def test_taint_the_bundle_depends_on_the_images_through_the_mechanism_alone(
    pair, stages, tmp_path, monkeypatch
) -> None:
    """Neighbouring or wholly different data, same mechanism outputs: the bundles are equal byte for byte.

    The mechanism's output is replaced by its noise.  Losses, norms, batch sizes, file names, labels and, for the
    neighbours, the number of images differ between the two runs, so any other way into the bundle would show.
    """
    from dataclasses import replace

    real = noise_module.noisy_mean

    def only_noise(clipped, **kwargs):
        return real(replace(clipped, sums=[torch.zeros_like(s) for s in clipped.sums]), **kwargs)

    monkeypatch.setattr(noise_module, "noisy_mean", only_noise)
    released = moments_module.released

    def only_noise_of_moments(total, *arguments, **kwargs):
        return released(replace(total, sums=torch.zeros_like(total.sums)), *arguments, **kwargs)

    monkeypatch.setattr(moments_module, "released", only_noise_of_moments)
    bundles, logs = [], []
    for number in (1, 2):
        images, labels = tiny_arrays(1 if pair == "neighbours" else number)
        if pair == "neighbours" and number == 2:
            images, labels = images[:-1], labels[:-1]
        folder = tmp_path / f"ward-{number}"
        folder.mkdir()
        np.savez(folder / "patients.npz", images=images, labels=labels if number == 1 else labels[::-1].copy())
        config = load_config(
            {
                **TINY_SETTINGS,
                "data": {"source": str(folder / "patients.npz"), "records": 60},
                "privacy": {"epsilon": 8, "insecure_seed": 7, "delta": 1e-3},
                "stages": stages,
                "private": TINY_SETTINGS["private"] | ({} if "pretrain" in stages else {"batch": 0}),
            }
        )
        training = api.prepare(config, tmp_path / f"run-{number}")
        for _ in training.steps():
            pass
        dpsyngen.evaluate(training.run, test=(images, labels), images=40, classifiers=("logreg",))
        dpsyngen.write_report(training.run)
        out = pack(training.run, tmp_path / f"{number}.zip", samples=6, seed=1, not_private=True).path
        folder_now = {p.relative_to(training.run.release): p.read_bytes() for p in training.run.release.rglob("*.*")}
        bundles.append((out.read_bytes(), folder_now))
        text = b"\0".join(contents(out).values())
        losses = [v["loss"] for v in training.private_log.read()]
        logs.append(losses)
        for secret in (b"ward-", b"patients", *(repr(v).encode() for v in losses), *training.randomness.key_forms()):
            assert secret not in text
        for image in images:
            assert image.tobytes() not in text
    assert bundles[0] == bundles[1]
    assert logs[0] != logs[1]


def test_files_that_are_no_part_of_a_release_stay_out(finished, tmp_path) -> None:
    run = copy_of(finished, tmp_path / "r")
    (run.release / "notes-on-patients.txt").write_text("ward 7")
    (run.release / "weights" / "old.safetensors").write_bytes(b"ward 7")
    (run.release / ".privacy.json.x1").write_text("ward 7")
    packed = pack(run, tmp_path / "b.zip")
    assert set(packed.left_out) == {"notes-on-patients.txt", "weights/old.safetensors", ".privacy.json.x1"}
    assert b"ward 7" not in b"".join(contents(packed.path).values())


@pytest.mark.parametrize("what", ["key", "hexadecimal key", "digest of the images"])
def test_secrets_that_stand_in_a_released_file_are_found(what, finished, tmp_path) -> None:
    from dpsyngen.privacy.randomness import Randomness

    run = copy_of(finished, tmp_path / "r")
    raw, text = Randomness.load(run.randomness_path).key_forms()
    digest = json.loads(run.data_path.read_text())["fingerprint"].encode()
    secret = {"key": raw, "hexadecimal key": text, "digest of the images": digest}[what]
    log = run.release / "public_training.jsonl"
    # Across the border of two pieces, which are searched one after the other.
    log.write_bytes(b" " * ((1 << 22) - 10) + secret + b" " * 100)
    with pytest.raises(ReleaseError, match="would be published"):
        pack(run, tmp_path / "b.zip")
    assert not (tmp_path / "b.zip").exists()


def test_path_of_the_images_is_found(tmp_path) -> None:
    np.savez(tmp_path / "patients.npz", images=tiny_arrays()[0], labels=tiny_arrays()[1])
    run = dpsyngen.train(tmp_path / "patients.npz", epsilon=4.0, out=tmp_path / "r", settings=TINY_SETTINGS)
    pack(run, tmp_path / "good.zip")
    (run.release / "public_training.jsonl").write_text(str(tmp_path / "patients.npz"))
    with pytest.raises(ReleaseError, match="the path of the images"):
        pack(run, tmp_path / "b.zip")


def test_links_in_the_release_are_refused(finished, tmp_path) -> None:
    run = copy_of(finished, tmp_path / "r")
    (run.release / "report.html").unlink(missing_ok=True)
    os.symlink(run.ledger_path, run.release / "report.html")
    with pytest.raises(ReleaseError, match="symbolic link"):
        pack(run, tmp_path / "b.zip")


def test_a_run_without_privacy_is_packed_only_when_that_is_said(tmp_path) -> None:
    for name, privacy in (("seed", {"insecure_seed": 1}), ("inf", {})):
        epsilon = 4.0 if privacy else float("inf")
        run = dpsyngen.train(
            tiny_arrays(), epsilon=epsilon, out=tmp_path / name, settings={**TINY_SETTINGS, "privacy": privacy}
        )
        with pytest.raises(ReleaseError, match="NOT PRIVATE"):
            pack(run, tmp_path / f"{name}.zip")
        assert not (tmp_path / f"{name}.zip").exists()
        packed = pack(run, tmp_path / f"{name}.zip", not_private=True)
        assert b"NOT PRIVATE" in contents(packed.path)["README.md"]


def test_certificate_must_follow_from_the_ledger(finished, tmp_path) -> None:
    run = copy_of(finished, tmp_path / "more")
    ledger = Ledger(run.ledger_path)
    ledger.note_private_access("evaluation")
    pack(run, tmp_path / "looked.zip")  # a look that stays in the private half changes nothing
    ledger.target_epsilon = 100.0
    ledger.charge(Mechanism(1.0, 2.0), "one more query after the release")
    with pytest.raises(LedgerError, match="used again after the release"):
        pack(run, tmp_path / "b.zip")

    run = copy_of(finished, tmp_path / "other")
    for path in (run.ledger_path, run.ledger_path.with_name("ledger.jsonl.head")):
        path.unlink()
    Ledger.create(run.ledger_path, target_epsilon=4.0, delta=1e-2, records=60)
    with pytest.raises(LedgerError, match="not the one that its certificate"):
        pack(run, tmp_path / "b.zip")


def test_refusals_leave_nothing_behind(finished, bundle, tmp_path) -> None:
    before = bundle.read_bytes()
    for out, options, message in (
        (tmp_path / "b.tar", {}, "ends in .zip"),
        (bundle, {}, "exists already"),
        (tmp_path / "none" / "b.zip", {}, "not a folder"),
        (finished.release / "b.zip", {}, "outside .*release"),
        (tmp_path / "b.zip", {"samples": -1}, "0 or more"),
        (tmp_path / "b.zip", {"key": tmp_path / "none"}, "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            pack(finished, out, **options)
    assert list(tmp_path.iterdir()) == []
    assert bundle.read_bytes() == before


def test_unfinished_run(tmp_path) -> None:
    config = load_config({**TINY_SETTINGS, "privacy": {"epsilon": 4}})
    training = api.prepare(config, tmp_path / "r", tiny_arrays())
    next(training.steps())
    with pytest.raises(RunError, match="not finished"):
        pack(training.run, tmp_path / "b.zip")


def test_more_samples_than_a_manifest_can_list_are_refused(finished, tmp_path) -> None:
    for wrong in (-1, MOST_SAMPLES + 1):
        with pytest.raises(ConfigError, match=r"0 or more, at most 100,000\. Publish more (.|\n)*`dpsyngen sample`"):
            pack(finished, tmp_path / "b.zip", samples=wrong)
    assert list(tmp_path.iterdir()) == []
    longest = f"samples/{folder_names(('x' * 255,))[0]}/{0:07d}.png"
    entry = json.dumps({longest: {"bytes": 2**20, "sha256": "0" * 64}}, indent=1)
    assert MOST_SAMPLES * len(entry) < SMALL


def test_full_disk_while_packing(finished, tmp_path, monkeypatch) -> None:
    import dpsyngen.release.bundle as module

    def full(path, members) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_zip", full)
    with pytest.raises(OSError, match="No space"):
        pack(finished, tmp_path / "b.zip", samples=3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_report_of_a_run_for_groups_where_renyi_has_no_bound(tmp_path) -> None:
    """Rényi DP's lemma gives nothing at a large ε, and report and certificate say so."""
    settings = {**TINY_SETTINGS, "privacy": {"group_size": 6}}
    run = dpsyngen.train(tiny_arrays(), epsilon=60.0, out=tmp_path / "r", settings=settings)
    assert json.loads((run.release / "privacy.json").read_text())["epsilon_by_rdp"] == "inf"
    assert "Rényi DP, a looser bound: no bound" in (run.release / "PRIVACY.md").read_text()
    report = dpsyngen.write_report(run)[1].read_text()
    assert "for up to 6 images of one person together" in report
    assert "had any 6 of the 60 private images been left out" in report
    assert "a looser bound: none" in report
