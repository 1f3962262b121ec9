"""Programs by name: discovery, refusal, and that importing the package is cheap."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from dpsyngen.errors import ConfigError
from dpsyngen.programs import Program, make_program, program_names, register, registry


def test_import_is_cheap() -> None:
    code = "import sys, dpsyngen.programs; print(sorted({'numba', 'PIL', 'torch', 'scipy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_no_private_package_is_reachable() -> None:
    code = (
        "import sys, dpsyngen.programs as p; p.program_names();"
        "print(*sorted(m for m in sys.modules if m.startswith('dpsyngen.') and 'programs' not in m))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert loaded == ["dpsyngen.errors", "dpsyngen.version"]


def test_config_rebuilds_the_program() -> None:
    program = make_program(
        "dead-leaves", resolution=np.int64(12), channels=1, seed=2**64 - 1, shape="circle", r_min=np.float32(0.25)
    )
    config = json.loads(json.dumps(program.config()))
    assert config == {
        "name": "dead-leaves",
        "resolution": 12,
        "channels": 1,
        "seed": 2**64 - 1,
        "shape": "disc",
        "colour": "grey",
        "r_min": 0.25,
        "r_max": 1.0,
        "exponent": 3.0,
        "mode": "exact",
        "supersample": 1,
    }
    assert make_program(**config) == program
    assert pickle.loads(pickle.dumps(program)) == program
    assert np.array_equal(make_program(**config)(3), program(3))


def test_unknown_name_and_parameter_are_refused_with_what_is_allowed() -> None:
    assert "dead-leaves" in program_names()
    with pytest.raises(ConfigError, match=r"'dead-leafs'.*dead-leaves"):
        make_program("dead-leafs", resolution=8, channels=1)
    with pytest.raises(ConfigError, match=r"'shapes'.*shape \(default 'mixed'\)"):
        make_program("dead-leaves", resolution=8, channels=1, shapes="disc")


@pytest.mark.parametrize(
    "bad",
    [
        {"resolution": 0},
        {"resolution": 2049},
        {"resolution": 8.0},
        {"resolution": True},
        {"resolution": "8"},
        {"channels": 2},
        {"channels": 4},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": None},
    ],
)
def test_common_parameters_out_of_range(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        make_program("dead-leaves", **{"resolution": 8, "channels": 1, **bad})


@dataclass(frozen=True, kw_only=True)
class _Ramp(Program):
    """Every pixel is index + step, so that a batch shows who drew what."""

    prior_tier: ClassVar[int] = 0
    step: int

    def _draw(self, indices: NDArray[np.uint64], out: NDArray[np.uint8]) -> None:
        out[:] = (indices + np.uint64(self.step)).astype(np.uint8)[:, None, None, None]


def test_a_family_is_one_decorated_class(monkeypatch: pytest.MonkeyPatch) -> None:
    program_names()  # discover first, so that what the rest registers is undone
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    register("test-ramp")(_Ramp)
    register("test-ramp")(_Ramp)  # a reload
    assert "test-ramp" in program_names()
    program = make_program("test-ramp", resolution=2, channels=1, step=1)
    assert program.batch([5, 0])[:, 0, 0, 0].tolist() == [6, 1]
    with pytest.raises(ConfigError, match="needs a value for step"):
        make_program("test-ramp", resolution=2, channels=1)
    with pytest.raises(ValueError, match="Two programs"):
        register("dead-leaves")(_Ramp)
    with pytest.raises(ValueError, match="not a program name"):
        register("Dead Leaves")


def test_indices() -> None:
    program = _Ramp(resolution=2, channels=3, step=0)
    for good in ([1, 2], (1, 2), range(1, 3), np.array([1, 2], dtype=np.int16), iter([1, 2])):
        assert program.batch(good)[:, 0, 0, 0].tolist() == [1, 2]
    assert program.batch([]).shape == (0, 3, 2, 2)
    assert program[np.int64(7)].shape == (3, 2, 2)
    for out_of_range in ([-1], [2**63], [2**70]):
        with pytest.raises(IndexError, match="0 to 2⁶³"):
            program.batch(out_of_range)
        with pytest.raises(IndexError, match="0 to 2⁶³"):
            program(out_of_range[0])
    with pytest.raises(TypeError):
        program.batch([0.5])
    with pytest.raises(TypeError):
        program.batch([True])
    with pytest.raises(ConfigError, match="one-dimensional"):
        program.batch([[1, 2]])
    with pytest.raises(ConfigError, match="threads"):
        program.batch([1], threads=0)
    with pytest.raises(TypeError):
        len(program)  # type: ignore[arg-type]


def test_an_error_in_a_thread_is_not_lost() -> None:
    class Broken(_Ramp):
        def _draw(self, indices: NDArray[np.uint64], out: NDArray[np.uint8]) -> None:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        Broken(resolution=2, channels=1, step=0).batch(range(9), threads=2)
