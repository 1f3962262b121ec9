"""Checking what a user gave: the value in the wanted type, or a ConfigError that says what is allowed."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dpsyngen.errors import ConfigError


def as_integer(name: str, value: object, low: int, high: int) -> int:
    """`value` as an int in [low, high]; ConfigError, naming the option, if it is anything else."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigError(f"{name}={value!r} is not an integer: give one from {low} to {high}.") from None
    if not low <= number <= high:
        raise ConfigError(f"{name}={number} is out of range: give an integer from {low} to {high}.")
    return number


def as_number(name: str, value: Any, low: float, high: float, *, above: bool = False, hint: str = "") -> float:
    """`value` as a float in [low, high], or in (low, high] if `above`."""
    allowed = f"give a number {'above' if above else 'from'} {low:g} {'and at most' if above else 'to'} {high:g}"
    allowed += f" ({hint})." if hint else "."
    try:
        if isinstance(value, bool | str):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name}={value!r} is not a number: {allowed}") from None
    if not low <= number <= high or (above and number == low) or math.isnan(number):
        raise ConfigError(f"{name}={number} is out of range: {allowed}")
    return number


def as_choice(name: str, value: Any, allowed: Sequence[str], what: str) -> str:
    """`value`, one of `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{name}={value!r} is not {what}: choose one of {', '.join(allowed)}.")
    return value


def as_flag(name: str, value: Any) -> bool:
    """`value` as a bool."""
    if not isinstance(value, bool | np.bool_):
        raise ConfigError(f"{name}={value!r} is not a yes or no: give true or false.")
    return bool(value)


def as_range(name: str, value: Any, low: float, high: float) -> tuple[float, float]:
    """`value` as a pair (a, b) with low ≤ a ≤ b ≤ high; one number stands for both."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = (value, value)
    if isinstance(value, str) or not isinstance(value, Iterable) or len(pair := list(value)) != 2:
        raise ConfigError(f"{name}={value!r} is not a range: give two numbers [a, b] with {low:g} ≤ a ≤ b ≤ {high:g}.")
    a, b = (as_number(name, v, low, high) for v in pair)
    if a > b:
        raise ConfigError(f"{name}={[a, b]} is empty: give [a, b] with a ≤ b.")
    return a, b


def as_counts(name: str, value: Any, low: int, high: int) -> tuple[int, int]:
    """`value` as a pair of whole numbers, low ≤ a ≤ b ≤ high; one number stands for both."""
    a, b = as_range(name, value, low, high)
    if a != int(a) or b != int(b):
        raise ConfigError(f"{name}={[a, b]} are not whole numbers: give two from {low} to {high}.")
    return int(a), int(b)


def as_weights(name: str, value: Any, keys: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """Weights of named choices as ((key, weight), …), from a mapping or from such pairs; one at least is positive."""
    items = list(value.items()) if isinstance(value, dict) else value
    try:
        pairs = [(key, weight) for key, weight in items]
    except (TypeError, ValueError):
        raise ConfigError(
            f"{name}={value!r} does not give weights: give a mapping such as {{{keys[0]}: 2, {keys[-1]}: 1}}."
        ) from None
    for key, _ in pairs:
        as_choice(name, key, keys, "something that can be weighted")
    if len({key for key, _ in pairs}) != len(pairs):
        raise ConfigError(f"{name}={value!r} names something twice: give each one weight.")
    weights = tuple((key, as_number(f"{name}.{key}", weight, 0.0, 1e9)) for key, weight in pairs)
    if not any(weight > 0 for _, weight in weights):
        raise ConfigError(f"{name}={value!r} has no positive weight: give one to at least one of {', '.join(keys)}.")
    return weights
