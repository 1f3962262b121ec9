"""Options that several commands have, and commands in one of several processes that torchrun started."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from dpsyngen.console import Console
from dpsyngen.distributed import Dismissed, numbers
from dpsyngen.errors import ConfigError, shown
from dpsyngen.files import read_yaml

Count = Annotated[int, typer.Option("-n", "--count", help="number of generated images")]
Sampler = Annotated[str | None, typer.Option(help="ddim, heun or dpmpp; default: the run's")]
SamplerSteps = Annotated[int | None, typer.Option("--steps", help="sampler steps")]
Guidance = Annotated[float | None, typer.Option(help="classifier-free guidance, 1 is none")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="a run directory, made by `dpsyngen train --out`")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="only results and errors")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object instead of text, for programs")]


def _device(value: str) -> str:
    from dpsyngen.hardware import kind_of

    return kind_of(value)


_DEVICES = "auto (a GPU where there is one), cpu, cuda, cuda:1, …"
Device = Annotated[str, typer.Option(help=_DEVICES, callback=_device)]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.NAME=VALUE", help="any other setting")]
AskedDevice = Annotated[str, typer.Option("--device", help=_DEVICES)]
"""As it was asked for: "auto" stays."""


def epsilon_of(text: str | None) -> float | None:
    """The value of ``--epsilon``; None where it was not given."""
    try:
        return None if text is None else float("inf" if text == "∞" else text)
    except ValueError:
        raise ConfigError(f"--epsilon is {text!r}, but must be a positive number, or inf for no privacy.") from None


def assignments(given: list[str], example: str = "section.name=value, such as private.beta2=0.99") -> dict[str, Any]:
    """Settings given as ``--set private.beta2=0.99``, as ``{"private": {"beta2": 0.99}}``."""
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


def with_assigned(options: dict[str, Any], assigned: dict[str, Any]) -> dict[str, Any]:
    """Settings that `options` say together with those of :func:`assignments`; ConfigError if both say the same one."""
    from dpsyngen.config import merge_settings

    for section, chosen in options.items():
        again = assigned.get(section)
        for name, value in again.items() if isinstance(again, dict) else ():
            if name in chosen:
                both = f"--set {section}.{name} is {shown(value)}, but an option says {shown(chosen[name])} already"
                raise ConfigError(f"{both}: leave one of them out.")
    return merge_settings(options, assigned)


SHARED = ("train", "sample", "programs save", "evaluate", "compare")
"""Commands whose work several processes share.  All others would do the same thing several times over."""


_WAIT = 10.0  # seconds


def require_shared(command: str) -> None:
    """Raise ConfigError if several processes were started for a command that is the work of one."""
    rank, count, _ = numbers()
    if count == 1 or command in SHARED or command == "programs":
        return
    text = (
        f"torchrun started {count} processes, but `dpsyngen {command}` is the work of one: start it without torchrun.  "
        f"What several share is {', '.join(SHARED)}."
    )
    raise Dismissed(text) if rank else ConfigError(text)


def _rank() -> int:
    try:
        return numbers()[0]
    except ConfigError:
        return 0  # what is wrong with the environment is said where the command needs to know


def silence_followers() -> None:
    """Close standard output in all processes but the main one, which speaks for them."""
    if _rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (until the process ends)


def tell(console: Console, kind: str, message: str) -> None:
    """Say why the command failed: the main process its own and what all have in common, another what is its own."""
    rank = _rank()
    if rank == 0:
        console.error(kind, message)
        return
    # Of a lost process the main one tells, unless it is the one that is lost.
    own = kind not in ("dismissed", "interrupted", "usage") and (kind != "rank-lost" or rank == 1)
    if own:
        console.error(kind, f"[rank {rank}] {message}")
    if not own or kind == "rank-lost":
        # torchrun ends all processes as soon as one has failed, so the main one, which tells, has to be the first.
        # It is then torchrun that ends the wait, most of the time at once.
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C is not to be answered with a traceback
        time.sleep(_WAIT)
