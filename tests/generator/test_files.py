"""A released generator from a stranger: refused with RunError before memory is taken, or sound."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from dpsyngen import Generator
from dpsyngen.data.labels import MAX_CLASSES
from dpsyngen.errors import ConfigError, RunError
from dpsyngen.generator.files import MAX_JSON_BYTES, read_description
from tests.fuzz.releases import description, make_release, weights


@pytest.fixture
def release(tmp_path: Path) -> Path:
    return make_release(tmp_path / "release")


def change(release: Path, place: str, value: Any) -> None:
    about = description()
    inner = about
    *parents, last = place.split("/")
    for key in parents:
        inner = inner[int(key) if key.isdigit() else key]
    inner[last] = value
    (release / "generator.json").write_text(json.dumps(about))


def refused(release: Path, why: str) -> None:
    with pytest.raises(RunError, match=why) as caught:
        Generator(release)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1500


def test_the_release_as_it_is(release: Path) -> None:
    images = Generator(release).sample(3)
    assert images.images.shape == (3, 1, 8, 8)
    assert images.class_names == ("cat", "dog")


def test_keys_of_later_versions_are_ignored(release: Path) -> None:
    change(release, "remark", {"anything": [1, 2]})
    assert Generator(release).resolution == 8


@pytest.mark.parametrize(
    ("place", "value", "why"),
    [
        ("format", 2, "format 2"),
        ("format", "1", "format '1'"),
        ("format", True, "format True"),
        ("resolution", 10**9, "resolution is 1000000000"),
        ("resolution", 10**400, "resolution"),
        ("resolution", 7, "multiple of"),
        ("resolution", 8.0, "resolution is 8.0"),
        ("resolution", "8", "resolution is '8'"),
        ("resolution", True, "resolution is True"),
        ("channels", 2, "channels is 2"),
        ("channels", 10**9, "channels"),
        ("class_names", "cat", "class_names"),
        ("class_names", [1, 2], "class_names"),
        ("class_names", None, "class_names"),
        ("class_names", ["cat", "cat"], "are the same"),
        ("class_names", ["cat", "\x1b[31m"], "control characters"),
        ("class_names", ["cat", "x" * 10**6], "longer than"),
        ("class_names", [str(i) for i in range(MAX_CLASSES + 1)], "class_names"),
        ("class_names", ["cat"], "shape"),
        ("class_names", ["a", "b", "c"], "shape"),
        ("network/size", "../../x", "network size"),
        ("network/size", "huge", "tensors|shape|multiple"),
        ("network/size", {"width": 10**9}, "network.size"),
        ("network/sigma_data", math.nan, "sigma_data"),
        ("network/sigma_data", 0, "sigma_data"),
        ("network/sigma_data", "0.5", "sigma_data"),
        ("sampling/steps", 10**9, "sampling.steps"),
        ("sampling/steps", 0.5, "sampling.steps"),
        ("sampling/sigma_max", math.inf, "sampling.sigma_max"),
        ("sampling/guidance", math.nan, "sampling.guidance"),
        ("sampling/rho", 0, "sampling.rho"),
        ("sampling/sampler", "euler", "sampling.sampler"),
        ("sampling/x", 1, "sampling.x"),
        ("sampling", None, "sampling"),
        ("private", "yes", "private"),
        ("conditional", {}, "conditional"),
        ("conditional", {"context": 1, "coarse": 0}, "conditional"),
        ("conditional", {"context": False, "coarse": False}, "tensors"),
        ("conditional", {f"n{i}": True for i in range(1000)}, "conditional"),
        ("stages", [], "stages"),
        ("stages", description()["stages"] * 5, "stages"),
        ("stages", description()["stages"][:1], "whole log"),
        ("stages", None, "stages"),
        ("stages/0/network", "../../x", "network"),
        ("stages/0/network", "a/b", "network"),
        ("stages/0/network", "x" * 300, "network"),
        ("stages/0/network", "coarse\n", "network"),
        ("stages/0/network", "", "network"),
        ("stages/0/network", "other", "nothing of the networks other"),
        ("stages/0/trained_by", "nobody", "trained_by"),
        ("stages/0/log_sigma_high", math.nan, "log_sigma_high"),
        ("stages/0/log_sigma_high", 3.0, "must meet"),
        ("stages/1/name", "context", "name of its own"),
    ],
)
def test_descriptions_that_are_not_allowed(release: Path, place: str, value: Any, why: str) -> None:
    change(release, place, value)
    refused(release, why)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{",
        '"format"',
        "[" * 10**6,
        '{"format": ' + "9" * 5000 + "}",
        '{"format": 1, "format": 1}',
        "\x00",
        "NaN",
    ],
)
def test_files_that_are_no_description(release: Path, text: str) -> None:
    (release / "generator.json").write_text(text)
    refused(release, "generator")


def test_a_key_that_is_given_twice(release: Path) -> None:
    (release / "generator.json").write_text(json.dumps(description())[:-1] + ', "resolution": 8}')
    refused(release, "twice")


def test_a_network_with_a_path_for_a_name(release: Path) -> None:
    """All else fits, and the file is there."""
    (release / "weights" / "context.safetensors").rename(release / "elsewhere.safetensors")
    about = description()
    about["stages"][0]["network"] = "../elsewhere"
    about["conditional"] = {"../elsewhere": True, "coarse": False}
    (release / "generator.json").write_text(json.dumps(about))
    refused(release, "network")


def test_description_that_is_too_large_not_utf8_or_a_link(release: Path, tmp_path: Path) -> None:
    file = release / "generator.json"
    file.write_text(json.dumps(description()) + " " * MAX_JSON_BYTES)
    refused(release, "over the limit")
    file.write_bytes(b"\xff\xfe" + json.dumps(description()).encode())
    refused(release, "holds no generator")
    file.unlink()
    refused(release, "No such file")
    file.symlink_to(tmp_path / "elsewhere.json")
    (tmp_path / "elsewhere.json").write_text(json.dumps(description()))
    refused(release, "symbolic link")
    file.unlink()
    os.mkfifo(file)
    refused(release, "not a plain file")


def test_the_most_classes_that_are_allowed_can_be_described(release: Path) -> None:
    """The longest names, each character escaped, stay below the limit on the file."""
    names = [f"{i:05}".ljust(255, '"') for i in range(MAX_CLASSES)]
    change(release, "class_names", names)
    assert read_description(release)[0].class_names == names


def spoilt(change: dict[str, Any]) -> bytes:
    tensors = load(weights(2))
    for name, tensor in change.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    return save(tensors)


FIRST = "network.first.weight"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (lambda: spoilt({FIRST: None}), "missing"),
        (lambda: spoilt({"network.extra": torch.zeros(1)}), "too much"),
        (lambda: spoilt({FIRST: torch.zeros(16, 2, 3, 3)}), "shape"),
        (lambda: spoilt({FIRST: torch.zeros(16, 9)}), "shape"),
        (lambda: spoilt({FIRST: torch.zeros(16, 1, 3, 3, dtype=torch.float16)}), "type 'F16'"),
        (lambda: spoilt({FIRST: torch.zeros(16, 1, 3, 3, dtype=torch.int32)}), "type 'I32'"),
        (lambda: spoilt({FIRST: torch.full((16, 1, 3, 3), math.nan)}), "NaN"),
        (lambda: spoilt({FIRST: torch.full((16, 1, 3, 3), math.inf)}), "NaN or infinite"),
        (lambda: weights(2)[:-1], "damaged"),
        (lambda: weights(2) + b"\0", "damaged"),
        (lambda: weights(0), "missing"),
        (lambda: b"", "header"),
        (lambda: struct.pack("<Q", 2**63) + b"{}", "header"),
        (lambda: struct.pack("<Q", 2**20 + 1) + b" " * (2**20 + 1), "header|limit"),
        (lambda: struct.pack("<Q", 10**5) + b"[" * 10**5, "damaged"),
        (lambda: struct.pack("<Q", 4) + b"null", "not a mapping"),
        (lambda: b"\x80\x04\x95" + bytes(100), "header"),
        (lambda: bytes(10**7), "over the limit"),
    ],
)
def test_weights_that_do_not_fit(release: Path, content: Any, why: str) -> None:
    (release / "weights" / "context.safetensors").write_bytes(content())
    refused(release, why)


def test_overlapping_tensors_are_refused(release: Path) -> None:
    """Each shape is right, but the places in the file are not."""
    good = weights(2)
    (length,) = struct.unpack("<Q", good[:8])
    header = json.loads(good[8 : 8 + length])
    names = [n for n in header if n != "__metadata__"]
    header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]
    text = json.dumps(header).encode()
    (release / "weights" / "context.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + good[8 + length :])
    refused(release, "damaged")


def test_weights_behind_a_link(release: Path, tmp_path: Path) -> None:
    file = release / "weights" / "context.safetensors"
    (tmp_path / "secret.safetensors").write_bytes(file.read_bytes())
    file.unlink()
    refused(release, "No such file")
    file.symlink_to(tmp_path / "secret.safetensors")
    refused(release, "symbolic link")


def test_no_network_takes_memory_before_its_weights_fit(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dpsyngen.diffusion.unet import UNet
    from dpsyngen.generator import files

    devices = []

    def noted(*arguments: Any) -> UNet:
        made = UNet(*arguments)
        devices.append({p.device.type for p in made.parameters()})
        return made

    monkeypatch.setattr(files, "UNet", noted)
    files._expected.cache_clear()
    (release / "weights" / "context.safetensors").write_bytes(weights(0))
    (release / "weights" / "coarse.safetensors").write_bytes(weights(2))
    refused(release, "weights")
    assert devices == [{"meta"}]


_HUGE = """
import resource, sys
from dpsyngen.errors import RunError
from dpsyngen import Generator
Generator(sys.argv[2])  # a sound one: what is imported late is imported now
assert "torch._dynamo" not in sys.modules  # PyTorch's compiler takes a second and a half, and nobody needs it here
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    Generator(sys.argv[1])
except RunError as error:
    assert "weights" in str(error), error
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_a_large_network_that_is_not_there_takes_no_memory(tmp_path: Path) -> None:
    """Eight of the largest networks for the largest images, with the most classes, are 900 MB of weights."""
    release = make_release(tmp_path / "release")
    about = description()
    names = [f"s{i}" for i in range(8)]
    bounds = [None, *(float(i) for i in range(7)), None]
    about["stages"] = [
        {"name": n, "log_sigma_low": bounds[i], "log_sigma_high": bounds[i + 1], "trained_by": by, "network": n}
        for i, (n, by) in enumerate(zip(names, ["private"] + ["public"] * 7, strict=True))
    ]
    about |= {
        "conditional": dict.fromkeys(names, True),
        "resolution": 1024,
        "network": {"size": "huge", "sigma_data": 0.5},
        "class_names": [str(i) for i in range(MAX_CLASSES)],
    }
    (release / "generator.json").write_text(json.dumps(about))
    for name in names:
        (release / "weights" / f"{name}.safetensors").write_bytes(weights(2))
    command = [sys.executable, "-c", _HUGE, str(release), str(make_release(tmp_path / "small"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 40


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": math.nan},
        {"steps": 2.5},
        {"steps": True},
        {"steps": 10**400 * -1},
        {"steps": 10**400},
        {"steps": 10_001},
        {"seed": 1.5},
        {"seed": "7"},
        {"guidance": math.nan},
        {"guidance": 10**400},
        {"guidance": "2"},
        {"churn": math.inf},
        {"sampler": "x" * 10**6},
    ],
)
def test_settings_of_a_sample(release: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        Generator(release).settings(**settings)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("given", ["emu", -1, 2, math.inf, math.nan, "9" * 5000, "\x1b[2J", None, [0]])
def test_classes_that_are_not_there(release: Path, given: Any) -> None:
    with pytest.raises(ConfigError, match="there is no class") as caught:
        Generator(release).labels(3, [given])
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_numpy_numbers_are_numbers(release: Path) -> None:
    settings = Generator(release).settings(steps=np.int64(2), seed=np.uint32(5), guidance=np.float32(1.5))  # type: ignore[arg-type]
    assert json.loads(json.dumps(settings.model_dump()))["steps"] == 2
