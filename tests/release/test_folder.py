"""Exports: whole or not at all, stamped, and ONNX graphs that compute what PyTorch does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dpsyngen.export.onnx_sampler import OnnxGenerator

import dpsyngen
from dpsyngen.errors import ConfigError, ReleaseError, RunError
from dpsyngen.release.bundle import pack
from dpsyngen.release.companions import COMPANIONS
from dpsyngen.release.hub.folder import export_release
from dpsyngen.training.run import Run

TOLERANCE = 1e-4
"""Of D(x; σ), whose values lie about in [-1, 1]: a hundredth of a grey level."""

# One network; experts with and without classes, attention and patches on moments; all in closed form, in colour.
ONNX_KINDS = ("dpdm", "residual-cleaning", "gaussian-colour")


@pytest.fixture(scope="module")
def graphs(releases, tmp_path_factory) -> dict[str, Path]:
    """ONNX exports of some kinds."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("onnx")
    return {kind: export_release(releases[kind], "onnx", folder / kind).path for kind in ONNX_KINDS}


def test_diffusers_folder_is_the_release_also_of_one_that_had_no_code(releases, tmp_path) -> None:
    old = tmp_path / "old"
    shutil.copytree(releases["shared"], old)
    for name in COMPANIONS:
        (old / name).unlink()
    (old / "notes-on-patients.txt").write_text("ward 7")
    done = export_release(old, "diffusers", tmp_path / "new")
    there = {p.relative_to(releases["shared"]).as_posix() for p in releases["shared"].rglob("*") if p.is_file()}
    assert set(done.files) == there
    for name in done.files:
        assert (done.path / name).read_bytes() == (releases["shared"] / name).read_bytes(), name
    assert "weights/pretrain.safetensors" in done.files


@pytest.mark.parametrize("kind", ONNX_KINDS)
def test_graphs_compute_what_pytorch_does_at_the_noise_levels_of_all_stages(kind, releases, graphs) -> None:
    """With 1, 3 and 7 images, each class and no class, with and without guidance."""
    generator, exported = dpsyngen.Generator(releases[kind]), OnnxGenerator(graphs[kind])
    classes = len(generator.class_names)
    rng = torch.Generator().manual_seed(0)
    asked = set()
    for sigma in (0.002, 0.02, 0.04978, 0.0498, 0.3, 2.0, 2.718, 2.72, 7.38, 7.4, 20.0, 80.0):
        asked.add(exported.owner(sigma)["name"])
        for count, guidance in ((1, 1.0), (3, 1.0), (7, 2.5)):
            x = torch.randn(count, generator.channels, 8, 8, generator=rng) * (0.5 + sigma)
            levels = torch.full((count,), sigma, dtype=torch.float64)
            for labels in (None, torch.arange(count) % classes) if classes else (None,):
                with torch.no_grad():
                    expected = generator.denoiser(guidance)(x, levels, labels).numpy()
                found = exported.denoise(x.numpy(), sigma, None if labels is None else labels.numpy(), guidance)
                assert np.abs(found - expected).max() <= TOLERANCE * max(1.0, np.abs(expected).max())
    assert asked == {s.name for s in generator.stages.stages}


@pytest.mark.parametrize("kind", ONNX_KINDS)
def test_images_drawn_by_onnxruntime_are_those_of_the_generator(kind, releases, graphs) -> None:
    generator, exported = dpsyngen.Generator(releases[kind]), OnnxGenerator(graphs[kind])
    cases: list[dict[str, Any]] = [{}, {"sampler": "ddim", "steps": 6, "seed": -2}, {"sampler": "heun", "steps": 4}]
    if generator.class_names:
        cases.append({"guidance": 3.0, "seed": 5})
    for options in cases:
        expected = generator.sample(5, **options).images
        found = exported.sample(5, exported.labels(5), batch_size=2, **options)
        apart = np.abs(found.astype(int) - expected.astype(int))
        # Rounding to grey levels can go either way.
        assert apart.max() <= 1, options
        assert (apart > 0).mean() < 0.02
    other = exported.sample(5, exported.labels(5), seed=8)
    assert (other != found).mean() > 0.5


def test_graphs_say_whose_they_are_and_nothing_of_this_machine(graphs, releases) -> None:
    import onnx

    from dpsyngen.release.card import digest_of

    for kind, folder in graphs.items():
        digest = digest_of((releases[kind] / "privacy.json").read_bytes())
        certificate = json.loads((folder / "privacy.json").read_text())
        about = json.loads((folder / "denoiser.json").read_text())
        assert about["certificate"]["sha256"] == digest
        assert about["certificate"]["epsilon"] == certificate["epsilon"]
        files = sorted(folder.glob("*.onnx"))
        named = {d["file"] for d in about["denoisers"].values()} | (
            {about["start"]["file"]} if about["start"] else set()
        )
        assert {f.name for f in files} == named
        for file in files:
            model = onnx.load(file)
            onnx.checker.check_model(model, full_check=True)
            notes = {p.key: p.value for p in model.metadata_props}
            assert notes["certificate_sha256"] == digest
            assert notes["certificate_private"] == "true"
            assert float(notes["certificate_epsilon"]) == certificate["epsilon"]
            assert {o.domain: o.version for o in model.opset_import}[""] == about["opset"] == 18
            assert {o.domain for o in model.opset_import} <= {"", "ai.onnx"}
            for tensor in (*model.graph.input, *model.graph.output):
                assert tensor.type.tensor_type.shape.dim[0].dim_param, "the number of images is fixed"
            data = file.read_bytes()
            for secret in (b"site-packages", b"dpsyngen/", b".py", str(Path.home()).encode(), os.getcwd().encode()):
                assert secret not in data


def test_the_sampler_that_comes_with_the_graphs_is_a_program_of_its_own(graphs, tmp_path) -> None:
    """Without dpsyngen and without PyTorch."""
    blocked = "import sys, runpy; sys.modules.update(dpsyngen=None, torch=None); "
    options = ["-n", "4", "--out", str(tmp_path / "i.npz"), "--seed", "3", "--classes", "2,0"]
    program = f"{blocked}sys.argv[1:] = {options!r}; runpy.run_path('sample.py', run_name='__main__')"
    for code in (0, 1):
        done = subprocess.run([sys.executable, "-c", program], cwd=graphs["dpdm"], capture_output=True, text=True)
        assert done.returncode == code, done.stderr
    assert "exists already" in done.stderr
    stored = np.load(tmp_path / "i.npz")
    exported = OnnxGenerator(graphs["dpdm"])
    assert stored["labels"].tolist() == [2, 0, 2, 0]
    assert np.array_equal(stored["images"], exported.sample(4, exported.labels(4, ["2", 0]), seed=3))


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
    for release, format, out, error, message in (
        (source, "tflite", tmp_path / "x", ConfigError, "must be one of diffusers, onnx"),
        (source, "diffusers", full, RunError, "exists already"),
        (bare, "diffusers", tmp_path / "x", ReleaseError, "no certificate"),
        (mixed, "onnx", tmp_path / "x", ReleaseError, "not of one release"),
        (linked, "diffusers", tmp_path / "x", ReleaseError, "symbolic link"),
    ):
        with pytest.raises(error, match=message):
            export_release(release, format, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert [p.name for p in full.iterdir()] == ["mine"]


def test_without_a_guarantee_only_when_that_is_said(tmp_path) -> None:
    from tests.release.conftest import make_release

    release = make_release("dpdm", tmp_path, insecure_seed=1)
    with pytest.raises(ReleaseError, match="NOT PRIVATE"):
        export_release(release, "diffusers", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    done = export_release(release, "diffusers", tmp_path / "x", not_private=True)
    assert "**NOT PRIVATE" in (done.path / "README.md").read_text(encoding="utf-8")


def test_onnx_that_is_not_installed_is_said_before_anything_is_done(releases, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"pip install 'dpsyngen\[onnx\]'"):
        export_release(releases["both"], "onnx", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


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
    code, _, err = call("export", run, "--out", tmp_path / "d")
    assert code == 2
    assert "exists already" in err
