"""What every family promises: purity, reproducible bits, configurations, parameters, sizes, and clear refusals."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpsyngen.errors import ConfigError
from dpsyngen.programs import Program, make_program, program_names
from tests.programs.examples import EXAMPLES

GOLDEN_FILE = Path(__file__).with_name("golden.json")
GOLDEN: dict[str, str] = json.loads(GOLDEN_FILE.read_text())


def make(example: str, resolution: int = 8, channels: int = 3, **more: Any) -> Program:
    name, params = EXAMPLES[example]
    return make_program(name, resolution=resolution, channels=channels, **{"seed": 7, **params, **more})


def sha(example: str) -> str:
    """Of eight images at 20 pixels, which is no power of two."""
    return hashlib.sha256(make(example, 20).batch(range(8)).tobytes()).hexdigest()


def test_every_family_has_an_example_and_a_golden_hash() -> None:
    assert {name for name, _ in EXAMPLES.values()} == set(program_names())
    assert GOLDEN.keys() == EXAMPLES.keys()


@pytest.mark.parametrize("example", EXAMPLES)
def test_golden_images(example: str) -> None:
    """The same on every machine and in every later version; a new law gets a new name or a new default."""
    assert sha(example) == GOLDEN[example]


def test_compiled_code_computes_what_plain_python_does() -> None:
    """No contraction to fused multiply-add, no inexact library call, no integer wrap-around, no stale cache."""
    code = (
        "import hashlib, sys; sys.path.insert(0, '.')\n"
        "from tests.programs.test_families import make\n"
        "from tests.programs.examples import EXAMPLES\n"
        "for e in EXAMPLES: print(e, hashlib.sha256(make(e, 7).batch([3, 2**40]).tobytes()).hexdigest())"
    )
    root = Path(__file__).parents[2]
    plain = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code],
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert plain.returncode == 0, plain.stderr
    for line in plain.stdout.splitlines():
        example, digest = line.split()
        compiled = hashlib.sha256(make(example, 7).batch([3, 2**40]).tobytes()).hexdigest()
        assert digest == compiled, example
    assert len(plain.stdout.splitlines()) == len(EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES)
@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=6), st.integers(1, 3))
@settings(max_examples=5)
def test_image_depends_on_nothing_but_its_index(example: str, indices: list[int], threads: int) -> None:
    program = make(example)
    alone = np.stack([program(i) for i in indices])
    assert np.array_equal(program.batch(indices, threads=threads), alone)
    assert np.array_equal(program.batch(indices[::-1]), alone[::-1])


@pytest.mark.parametrize("example", EXAMPLES)
def test_images_differ_by_index_and_seed_and_vary(example: str) -> None:
    images = make(example, 16).batch(range(40))
    other = make(example, 16, seed=8).batch(range(40))
    assert len({image.tobytes() for image in [*images, *other]}) > 70
    assert images.std() > 20


@pytest.mark.parametrize("example", EXAMPLES)
def test_config_rebuilds_the_program(example: str) -> None:
    program = make(example)
    again = make_program(**json.loads(json.dumps(program.config())))
    assert again == program
    assert hash(again) == hash(program)
    assert pickle.loads(pickle.dumps(program)) == program
    assert np.array_equal(again.batch([4, 9]), program.batch([4, 9]))
    assert program.prior_tier in (0, 1, 2)


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize(("resolution", "channels"), [(1, 1), (2, 3), (9, 1), (33, 3)])
def test_any_size(example: str, resolution: int, channels: int) -> None:
    name, params = EXAMPLES[example]
    images = make_program(name, resolution=resolution, channels=channels, seed=1, **params).batch(range(6))
    assert images.shape == (6, channels, resolution, resolution)
    assert images.dtype == np.uint8


def test_a_family_has_images_of_any_size_that_programs_have() -> None:
    assert make_program("family", resolution=1030, channels=1, seed=1).batch([0]).shape == (1, 1, 1030, 1030)


def test_float_images_are_the_same_from_minus_one_to_one() -> None:
    program = make("dead-leaves", 16, colour="black-white")
    floats = program.batch(range(5), dtype=np.float32)
    assert floats.dtype == np.float32
    assert (floats.min(), floats.max()) == (-1.0, 1.0)
    assert np.array_equal(np.rint((floats + 1) * 127.5).astype(np.uint8), program.batch(range(5)))
    with pytest.raises(ConfigError, match=r"float64.*float32"):
        program.batch([0], dtype=np.float64)


def test_tiers() -> None:
    tiers = {example: make(example).prior_tier for example in EXAMPLES}
    assert {e for e, tier in tiers.items() if tier == 1} == {
        *("strokes", "contours", "contours-harmonics"),
        *("mixture", "affine", "blur", "invert"),
        *("family", "family-textured", "family-whole"),
        *("scene", "scene-leaves", "scene-before-leaves"),
    }
    assert tiers["dead-leaves"] == tiers["spectrum"] == tiers["fractal"] == tiers["random-network"] == 0


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("spectrum", {"slope": [3, 1]}, "slope is .*a ≤ b"),
        ("spectrum", {"slope": "steep"}, "slope is 'steep', but must be two numbers"),
        ("spectrum", {"slope": [1, 2, 3]}, "two numbers"),
        ("spectrum", {"colour": "rotation", "channels": 1}, "channels=3"),
        ("spectrum", {"turn": "yes"}, "true or false"),
        ("wavelet-marginal", {"tails": [0.1, 1]}, "from 0.2 to 4"),
        ("smooth-noise", {"kind": "simplex"}, "perlin, ridged"),
        ("smooth-noise", {"octaves": 0}, "octaves is 0"),
        ("smooth-noise", {"cells": [0, 4]}, "cells is 0"),
        ("random-network", {"kind": "trained"}, "sparse, oriented"),
        ("random-network", {"width": 2}, "width is 2"),
        ("fractal", {"maps": [1, 3]}, "from 2 to 8"),
        ("fractal", {"maps": [2.5, 3]}, "whole numbers"),
        ("fractal", {"ground": "grey"}, "black, white, random"),
        ("strokes", {"width": [0.1, 2]}, r"width is 2(\.0)?"),
        ("strokes", {"strokes": 40}, "strokes is 40"),
        ("contours", {"shape": "star"}, "polygon, superellipse"),
        ("contours", {"outline": 1.5}, "outline is 1.5"),
        ("mixture", {"programs": []}, "1 to 64"),
        ("mixture", {"programs": ["strokes"], "weights": [1, 2]}, "does not fit 1"),
        ("mixture", {"programs": ["strokes"], "weights": [0]}, "all 0"),
        ("mixture", {"programs": ["strokes", {"name": "contours", "resolution": 8}]}, r"programs\[1\] sets resolution"),
        ("mixture", {}, "needs a value for programs"),
        ("blur", {"source": {"name": "strokes", "stroke": 3}}, "no parameter 'stroke'"),
        ("blur", {"source": "strokes", "deviation": [0, 100]}, "deviation is 100"),
        ("affine", {"source": "strokes", "scale": 0}, "scale is 0"),
        ("invert", {"source": "strokes", "probability": None}, "probability is None"),
    ],
)
def test_bad_parameters(name: str, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_program(name, **{"resolution": 8, "channels": 3, **bad})


def test_threads_survive_a_fork() -> None:
    """The threads that draw stay for the next batch, but a forked process has none of them."""
    program = make("contours", 16)
    before = program.batch(range(200), threads=2)
    child = os.fork()
    if child == 0:
        same = np.array_equal(program.batch(range(200), threads=2), before)
        os._exit(0 if same else 1)
    deadline = time.monotonic() + 60
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, 9)
        time.sleep(0.01)
    assert done[1] == 0
