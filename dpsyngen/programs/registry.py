"""Programs by name.

A family is one file in ``families/`` whose class carries ``@register("its-name")``; nothing else lists it.
The files are imported on the first question asked here, not with `dpsyngen.programs`, as many import numba.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from dpsyngen.errors import ConfigError
from dpsyngen.programs.base import Program

_P = TypeVar("_P", bound=type[Program])

# What a prior tier means, in the words of configurations, releases and reports.
TIERS = {
    0: "agnostic (no knowledge of the domain)",
    1: "generic shape (no knowledge of the domain)",
    2: "domain simulator (prior knowledge of the domain)",
}

_registered: dict[str, type[Program]] = {}


def register(name: str) -> Callable[[_P], _P]:
    """Class decorator: make a `Program` dataclass known as `name` (lower-case words joined by hyphens).

    Works for classes outside this package too, once their module is imported.

    Raises:
        ValueError: `name` is malformed or taken by another class, or the class has no `prior_tier`.
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
    *("contours", "dead_leaves", "faces", "fractal", "garments", "glyphs", "mixture", "random_network", "smooth_noise"),
    *("spectrum", "strokes", "wavelet_marginal", "wrappers"),
)


def _discover() -> None:
    """Import every family; imports are cached, so the second call costs microseconds."""
    for name in _FAMILIES:
        importlib.import_module(f"{__package__}.{name}")


def program_names() -> list[str]:
    """Names that `make_program` accepts, sorted."""
    _discover()
    return sorted(_registered)


def program_class(name: str) -> type[Program]:
    """The class registered as `name`; its dataclass fields are its parameters.

    Raises:
        ConfigError: there is no such program.
    """
    _discover()
    if name not in _registered:
        raise ConfigError(f"There is no program named {name!r}: choose one of {', '.join(sorted(_registered))}.")
    return _registered[name]


def make_program(name: str, *, resolution: int, channels: int, seed: int = 0, **params: Any) -> Program:
    """Build a program.

    Args:
        name: one of `program_names`.
        resolution: height and width in pixels.
        channels: 1 or 3.
        seed: public; see `Program`.
        params: parameters of the family; see its class.

    Raises:
        ConfigError: unknown name or parameter, or a value that is not allowed.
    """
    cls = program_class(name)
    common = {field.name for field in fields(Program)}
    own = {field.name: field for field in fields(cls) if field.name not in common}
    unknown = sorted(params.keys() - own.keys())
    if unknown:
        allowed = ", ".join(
            key if field.default is MISSING else f"{key} (default {field.default!r})" for key, field in own.items()
        )
        raise ConfigError(
            f"Program {name!r} has no parameter {', '.join(map(repr, unknown))}: "
            f"it takes {allowed or 'none of its own'}, besides resolution, channels and seed. "
            "Correct the name or leave it out."
        )
    missing = sorted(
        key
        for key, field in own.items()
        if key not in params and field.default is MISSING and field.default_factory is MISSING
    )
    if missing:
        raise ConfigError(f"Program {name!r} needs a value for {', '.join(missing)}: give it.")
    return cls(resolution=resolution, channels=channels, seed=seed, **params)
