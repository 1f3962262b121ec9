"""Programs by name, and programs inside programs.

A family is a class with ``@register("its-name")`` in a module that `_FAMILIES` lists.  These modules are imported on
the first question asked here, not with `dpsyngen.programs`, as they import numba.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, TypeVar

import numpy as np

from dpsyngen.errors import ConfigError
from dpsyngen.programs.base import GIVEN, Program, plain

_P = TypeVar("_P", bound=type[Program])

# What a prior tier means, in the words of configurations, releases and reports.
TIERS = {
    0: "agnostic (no knowledge of the domain)",
    1: "generic shape (no knowledge of the domain)",
    2: "domain simulator (prior knowledge of the domain)",
}

REQUIRED = MISSING  # in place of a default, of a parameter that has none

_NESTED = np.uint64(0x6E657374)  # "nest"

_registered: dict[str, type[Program]] = {}


def register(name: str) -> Callable[[_P], _P]:
    """Make a `Program` dataclass known as `name` (lower-case words joined by hyphens); a class decorator.

    Works for classes outside this package too, once their module is imported.  ValueError if `name` is malformed or
    taken, or the class has no `prior_tier`.
    """
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        raise ValueError(f"{name!r} is not a program name: use lower-case words joined by hyphens.")

    def add(cls: _P) -> _P:
        taken = _registered.get(name)
        # The same class again is a reload, not a clash.
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"Two programs are named {name!r}: {taken.__module__} and {cls.__module__}.")
        tier = getattr(cls, "prior_tier", None)
        if tier not in (0, 1, 2) and not isinstance(tier, property):  # programs that hold others take theirs from them
            raise ValueError(f"{cls.__qualname__} needs a class attribute prior_tier of 0, 1 or 2.")
        cls.name = name
        _registered[name] = cls
        return cls

    return add


_FAMILIES = (
    *("contours", "dead_leaves", "fractal", "random_network", "smooth_noise", "spectrum", "strokes"),
    *("tasks", "wavelet_marginal", "wrappers"),
)


def _discover() -> None:
    """Import every family; imports are cached, so the second call costs microseconds."""
    for name in _FAMILIES:
        importlib.import_module(f"{__package__}.{name}")


def program_names() -> list[str]:
    """Return the names that `make_program` accepts, sorted."""
    _discover()
    return sorted(_registered)


def program_class(name: str) -> type[Program]:
    """Return the class called `name`, whose dataclass fields are its parameters; ConfigError if there is none."""
    _discover()
    if name not in _registered:
        raise ConfigError(f"There is no program named {name!r}: choose one of {', '.join(sorted(_registered))}.")
    return _registered[name]


def parameters(cls: type[Program]) -> dict[str, Any]:
    """Return a family's own parameters with their defaults; `REQUIRED` where a value has to be given."""
    return {field.name: field.default for field in fields(cls) if field.name not in GIVEN}


def usual_tier(cls: type[Program]) -> int | None:
    """Return the prior tier of a family with its default parameters; None if it is that of programs to be given."""
    if isinstance(cls.prior_tier, int):
        return cls.prior_tier
    return None if REQUIRED in parameters(cls).values() else cls(resolution=8, channels=1).prior_tier


def make_program(name: str, *, resolution: int, channels: int, seed: int = 0, **params: Any) -> Program:
    """Build a program of :func:`program_names`, see `Program`; ConfigError if a name or value is not allowed."""
    cls = program_class(name)
    own = parameters(cls)
    unknown = sorted(params.keys() - own.keys())
    if unknown:
        known = (k if default is REQUIRED else f"{k} (default {default!r})" for k, default in own.items())
        raise ConfigError(
            f"Program {name!r} has no parameter {', '.join(map(repr, unknown))}: it takes "
            f"{', '.join(known) or 'none'} besides resolution, channels and seed."
        )
    missing = sorted(k for k, default in own.items() if default is REQUIRED and k not in params)
    if missing:
        raise ConfigError(f"Program {name!r} needs a value for {', '.join(missing)}: give it.")
    return cls(resolution=resolution, channels=channels, seed=seed, **params)


def inner_program(outer: Program, key: str, value: Any, *, position: int = 0) -> Program:
    """Build what parameter `key` of `outer` describes: a name, a mapping with name and parameters, or a Program.

    It gets resolution and channels of `outer`, and a seed that is a function of the outer seed and of `position`, so
    that two inner programs of the same family are independent.  ConfigError if `value` is none of these, or sets those.
    """
    from dpsyngen.programs.drawing.counter_rng import words

    value = {"name": value} if isinstance(value, str) else plain(value)
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ConfigError(
            f"{key}={value!r} is not a program: give a name such as dead-leaves, or a mapping with name and parameters."
        )
    given = [k for k in GIVEN if k in value]
    if given:
        raise ConfigError(f"{key} sets {', '.join(given)}: leave that out, the outer program {outer.name!r} gives it.")
    seed, _ = words(np.uint64(outer.seed), _NESTED, np.uint64(position), np.uint64(0))
    return make_program(**value, resolution=outer.resolution, channels=outer.channels, seed=int(seed))
