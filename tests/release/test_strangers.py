"""A release and its samples are opened by diffusers and datasets in a process that cannot import dpsyngen."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dpsyngen
from dpsyngen.generator.samples import write_samples

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("releases")]  # made once

for package in ("diffusers", "datasets"):  # which take seconds to import, and are another process's
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

ROOT = Path(__file__).parents[2]
STRANGER = Path(__file__).with_name("stranger.py")
LONG = os.environ.get("DPSYNGEN_LONG") == "1"

SAMPLER_CASES: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in ("dpdm", "both", "shared", "cleaning", "residual", "residual-prior")),
    *((kind, {}) for kind in ("gaussian", "gaussian-colour")),
    ("both", {"sampler": "ddim", "steps": 7, "guidance": 1.0, "seed": 3}),
    ("both", {"sampler": "heun", "steps": 5, "guidance": 3.5, "seed": -1}),
    ("dpdm", {"sampler": "heun", "steps": 4, "churn": 10.0, "seed": 2**40}),
    ("residual-prior", {"sampler": "ddim", "steps": 4, "guidance": 1.5, "classes": ["2", "0"]}),
    ("residual-prior", {"sampler": "heun", "steps": 3, "guidance": 0.0}),
    ("residual", {"sampler": "dpmpp", "steps": 6, "seed": 9}),
    ("gaussian", {"seed": 4, "classes": [1]}),
    ("shared", {"sampler": "dpmpp", "steps": 9, "batch_size": 4}),
    ("instant", {}),
]
COUNT = 7
IMAGES = np.random.default_rng(0).integers(0, 256, (9, 3, 8, 8), dtype=np.uint8)
LABELS = np.arange(9) % 4
# Alphabetical order is not the order of the classes, and two of them clash as folder names.
NAMES = ("zebra: #1", "10", 'a/b "x", é', 'a:b "x", é')


def as_called(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `Generator.sample` by the names that the pipeline has for them."""
    names = {"steps": "num_inference_steps", "guidance": "guidance_scale", "classes": "class_labels"}
    return {names.get(k, "images_at_a_time" if k == "batch_size" else k): v for k, v in options.items()}


def tasks_of(releases: dict[str, Path], folder: Path) -> dict[str, Any]:
    pipelines = []
    for number, (kind, options) in enumerate(SAMPLER_CASES):
        call = {"batch_size": COUNT, "seed": 0, **as_called(options)}
        pipelines.append({"release": str(releases[kind]), "call": call, "out": str(folder / f"{number}.npy")})
    for number in (0, 1):
        pipelines[number]["custom"] = True
    pipelines[8] |= {
        "save": str(folder / "saved"),
        "wrong": [{"output_type": "jpg"}, {"batch_size": 0}, {"sampler": "euler"}, {"class_labels": ["cow"]}],
    }
    for name in ("samples", "samples.parquet"):
        write_samples(folder / name, iter([IMAGES[:5], IMAGES[5:]]), LABELS, NAMES, {"seed": 1})
    write_samples(folder / "plain.parquet", iter([IMAGES[:, :1]]), None, (), {})
    write_samples(folder / "plain", iter([IMAGES[:, :1]]), None, (), {})
    names = json.loads((folder / "samples" / "about.json").read_text())["class_names"]
    sets = [
        {"load": ["parquet"], "options": {"data_files": str(folder / "samples.parquet")}},
        {"load": ["imagefolder"], "options": {"data_dir": str(folder / "samples")}, "names": names},
        {"load": [str(folder / "samples")]},
        {"load": ["parquet"], "options": {"data_files": str(folder / "plain.parquet")}},
        {"load": ["imagefolder"], "options": {"data_dir": str(folder / "plain")}},
    ]
    for number, task in enumerate(sets):
        task["out"] = str(folder / f"set-{number}.npy")
    return {"pipelines": pipelines, "sets": sets, "cache": str(folder / "cache"), "result": str(folder / "result.json")}


def run_stranger(python: str | Path, tasks: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Carry out the tasks in another process, in an empty folder, and return what it found."""
    (folder / "tasks.json").write_text(json.dumps(tasks))
    (folder / "away").mkdir()
    shutil.copy(STRANGER, folder / "away")
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder / "away"), "LANG": "C.UTF-8"}
    done = subprocess.run(
        [python, "stranger.py", folder / "tasks.json"],
        cwd=folder / "away",
        env=environment | {"OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(Path(tasks["result"]).read_text())


def check(releases: dict[str, Path], tasks: dict[str, Any], found: dict[str, Any], same: Callable[..., bool]) -> None:
    """That what was loaded is what dpsyngen draws and wrote; `same` compares two arrays of pictures."""
    drawn = {}
    for number, (kind, options) in enumerate(SAMPLER_CASES):
        expected = dpsyngen.Generator(releases[kind]).sample(COUNT, **options)
        pixels = np.load(tasks["pipelines"][number]["out"])
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
        assert same(pixels, expected.images), (kind, options)
        about = found["pipelines"][number]
        assert about["class"] == "DPSynGenPipeline"
        assert about["classes"] == list(expected.class_names)
        drawn[number] = pixels.tobytes()
    # Had networks, guidance or seeds been of no effect, the comparison would show nothing.
    assert len(set(drawn.values())) == len(drawn)
    for number, images in enumerate((IMAGES, IMAGES, IMAGES, IMAGES[:, :1], IMAGES[:, :1])):
        pixels = np.load(tasks["sets"][number]["out"])
        assert np.array_equal(pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2), images), number
    for number, about in enumerate(found["sets"]):
        assert about["image"] == "Image"
        assert about["labels"] == (None if number > 2 else LABELS.tolist())
        assert about["names"] == (list(NAMES) if number < 2 else None)
        assert about["class_names"] == ([NAMES[i] for i in LABELS] if number in (1, 2) else None)


@pytest.fixture(scope="module")
def visit(releases, tmp_path_factory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tasks, and what a process found that cannot import dpsyngen."""
    folder = tmp_path_factory.mktemp("stranger")
    tasks = tasks_of(releases, folder) | {"block": True}
    return tasks, run_stranger(sys.executable, tasks, folder)


def test_diffusers_draws_the_same_pixels_and_datasets_reads_the_same_samples(releases, visit) -> None:
    """Every variant, with and without classes, guidance, each sampler, churn; every image equal in every pixel."""
    check(releases, *visit, same=np.array_equal)


def test_the_pipeline_keeps_to_the_conventions_of_diffusers(releases, visit) -> None:
    tasks, found = visit
    about = found["pipelines"][8]
    assert about["same"] == {"np": True, "pt": True, "uint8": True}
    kind, size, sampler, label, target, half, untrusted = about["errors"]
    asked = about["asked"]
    assert all(asked["forms"]), asked["forms"]
    assert asked["as many"] == [3, 2]
    assert asked["again"]
    assert asked["each"]
    assert asked["free"] == [True, True]
    assert "nothing" not in asked["wrong"], asked["wrong"]
    assert "2 generators for 3 images" in asked["generators"]
    assert "both given" in asked["both"]
    assert "'jpg'" in kind
    assert "at least 1" in size
    assert "'euler'" in sampler
    assert "'cow'" in label
    assert "is not empty" in target
    assert "torch.float32" in half
    assert "trust_remote_code" in untrusted
    saved = Path(tasks["pipelines"][8]["save"])
    for file in saved.rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (releases["both"] / file.relative_to(saved)).read_bytes()
    assert (saved / "privacy.json").exists()
    assert np.array_equal(
        dpsyngen.Generator(saved).sample(2).images, dpsyngen.Generator(releases["both"]).sample(2).images
    )


@pytest.mark.network
@pytest.mark.skipif(not LONG, reason="installs diffusers, datasets and PyTorch anew; set DPSYNGEN_LONG=1")
def test_in_a_new_virtual_environment_without_dpsyngen(releases, tmp_path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    subprocess.run([*pip, "torch", "numpy", "pillow", "safetensors", "diffusers", "datasets"], check=True)
    tasks = tasks_of(releases, tmp_path)
    # The same versions on the same machine: the same pixels.
    check(releases, tasks, run_stranger(python, tasks, tmp_path), same=np.array_equal)
