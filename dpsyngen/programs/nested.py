"""Programs inside programs: textures, mixtures and wrappers."""

from __future__ import annotations

from typing import Any

import numpy as np

from dpsyngen.errors import ConfigError
from dpsyngen.programs.base import Program
from dpsyngen.programs.registry import make_program

_STREAM = np.uint64(0x6E657374)  # "nest"
_GIVEN = ("resolution", "channels", "seed")


def inner_program(outer: Program, key: str, value: Any, *, position: int = 0, resolution: int | None = None) -> Program:
    """The program that parameter `key` of `outer` describes: a name, a mapping with name and parameters, or a Program.

    It gets the channels of `outer`, its resolution unless another is given, and a seed that is a function of the outer
    seed and of `position`, so that two inner programs of the same family are independent.

    Raises:
        ConfigError: `value` is none of these, or sets what the outer program sets.
    """
    from dpsyngen.programs.drawing.counter_rng import words

    if isinstance(value, Program):
        value = {k: v for k, v in value.config().items() if k not in _GIVEN}
    elif isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ConfigError(
            f"{key}={value!r} is not a program: give a name such as dead-leaves, or a mapping with name and parameters."
        )
    given = [k for k in _GIVEN if k in value]
    if given:
        raise ConfigError(f"{key} sets {', '.join(given)}: leave that out, the outer program {outer.name!r} gives it.")
    seed, _ = words(np.uint64(outer.seed), _STREAM, np.uint64(position), np.uint64(0))
    settings = {**value, "channels": outer.channels, "seed": int(seed), "resolution": resolution or outer.resolution}
    return make_program(**settings)


def tier_of(own: int, *inner: Program | None) -> int:
    """The prior tier of a program that holds others: the largest of all, as it assumes what they assume."""
    return max(own, *(program.prior_tier for program in inner if program is not None), 0)
