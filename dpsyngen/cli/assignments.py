"""Settings given on the command line as section.name=value."""

from __future__ import annotations

from typing import Any

from dpsyngen.errors import ConfigError, shown
from dpsyngen.files import read_yaml


def assignments(given: list[str], example: str = "section.name=value, such as private.beta2=0.99") -> dict[str, Any]:
    """``private.beta2=0.99`` -> ``{"private": {"beta2": 0.99}}``."""
    out: dict[str, Any] = {}
    for text in given:
        path, equals, value = text.partition("=")
        parts = path.split(".")
        if not equals or not all(parts):
            raise ConfigError(f"--set {shown(text)} must read {example}.")
        inner = out
        for part in parts[:-1]:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"--set {shown(text)} goes below a value that is set already.")
        inner[parts[-1]] = read_yaml(value, f"--set {text}")
    return out
