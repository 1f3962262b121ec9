"""Exports: whole or not at all, and stamped."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import dpsyngen
from dpsyngen.errors import ReleaseError, RunError
from dpsyngen.release.bundle import pack
from dpsyngen.release.card import COMPANIONS
from dpsyngen.release.place import export_release
from dpsyngen.training.run import Run

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("releases")]  # made once


def test_diffusers_folder_is_the_release_also_of_one_that_had_no_code(releases, tmp_path) -> None:
    old = tmp_path / "old"
    shutil.copytree(releases["shared"], old)
    for name in COMPANIONS:
        (old / name).unlink()
    (old / "notes-on-patients.txt").write_text("ward 7")
    done = export_release(old, tmp_path / "new")
    there = {p.relative_to(releases["shared"]).as_posix() for p in releases["shared"].rglob("*") if p.is_file()}
    assert set(done.files) == there
    for name in done.files:
        assert (done.path / name).read_bytes() == (releases["shared"] / name).read_bytes(), name
    assert "weights/pretrain.safetensors" in done.files


def test_refusals_leave_nothing_behind(releases, tmp_path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").touch()
    source = releases["dpdm"]
    bare = tmp_path / "bare"
    shutil.copytree(source, bare)
    (bare / "privacy.json").unlink()
    mixed = tmp_path / "mixed"
    shutil.copytree(source, mixed)
    (mixed / "privacy.json").write_bytes((releases["cleaning"] / "privacy.json").read_bytes())
    linked = tmp_path / "linked"
    shutil.copytree(source, linked)
    (linked / "config.yaml").unlink()
    (linked / "config.yaml").symlink_to("/etc/hostname")
    before = sorted(p.name for p in tmp_path.iterdir())
    for release, out, error, message in (
        (source, full, RunError, "exists already"),
        (bare, tmp_path / "x", ReleaseError, "certificate .* missing"),
        (mixed, tmp_path / "x", ReleaseError, "not of one release"),
        (linked, tmp_path / "x", ReleaseError, "symbolic link"),
    ):
        with pytest.raises(error, match=message):
            export_release(release, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert [p.name for p in full.iterdir()] == ["mine"]


def test_without_a_guarantee_only_when_that_is_said(tmp_path) -> None:
    from tests.release.conftest import make_release

    release = make_release("dpdm", tmp_path, insecure_seed=1)
    with pytest.raises(ReleaseError, match="NOT PRIVATE"):
        export_release(release, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    done = export_release(release, tmp_path / "x", not_private=True)
    assert "**NOT PRIVATE" in (done.path / "README.md").read_text(encoding="utf-8")


def test_command(releases, tmp_path, call) -> None:
    run = releases["gaussian"].parent
    code, out, _ = call("export", run, "--out", tmp_path / "d")
    assert code == 0
    assert "ε = " in out
    assert "code" in out
    code, out, _ = call("export", tmp_path / "d", "--out", tmp_path / "e", "--json")
    about = json.loads(out)
    assert (code, about["format"], about["private"]) == (0, "diffusers", True)
    assert set(about["files"]) == {p.relative_to(tmp_path / "e").as_posix() for p in (tmp_path / "e").rglob("*.*")}
    pack(Run(run), tmp_path / "b.zip")
    code, out, _ = call("export", tmp_path / "b.zip", "--out", tmp_path / "f", "--json")
    assert (code, json.loads(out)["certificate_sha256"]) == (0, about["certificate_sha256"])
    same = dpsyngen.Generator(tmp_path / "f").sample(2).images
    assert np.array_equal(same, dpsyngen.Generator(releases["gaussian"]).sample(2).images)
    for options, message in (
        (("--out", tmp_path / "d"), "exists already"),
        (("--format", "onnx"), "must be diffusers"),
    ):
        code, _, err = call("export", run, "--out", tmp_path / "x", *options)
        assert code == 2
        assert message in err
