"""Options and arguments that several commands have, and what their values mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dpsyngen.errors import ConfigError, shown

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="a run directory, made by `dpsyngen train --out`")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="only results and errors")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object instead of text, for programs")]


def _device(value: str) -> str:
    from dpsyngen.hardware import kind_of

    return kind_of(value)


_DEVICES = "auto (a GPU where there is one), cpu, cuda, cuda:1, …"
Device = Annotated[str, typer.Option(help=_DEVICES, callback=_device)]
AskedDevice = Annotated[str, typer.Option("--device", help=_DEVICES)]
"""As it was asked for: "auto" stays."""


def epsilon_of(text: str) -> float:
    """The value of ``--epsilon``."""
    try:
        return float("inf") if text in ("inf", "∞") else float(text)
    except ValueError:
        raise ConfigError(f"--epsilon is {text!r}, but must be a positive number, or inf for no privacy.") from None


def assignments(given: list[str], example: str = "section.name=value, such as private.beta2=0.99") -> dict[str, Any]:
    """Settings given as ``--set private.beta2=0.99``, as ``{"private": {"beta2": 0.99}}``."""
    from dpsyngen.files import read_yaml

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
