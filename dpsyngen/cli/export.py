"""The command export.  Thin: parse, call the library, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpsyngen.cli.options import AsJson, Quiet


def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="a run directory, a copy of its release folder, or a bundle (.zip)")
    ],
    out: Annotated[Path, typer.Option(help="folder to make")],
    format: Annotated[str, typer.Option(help="diffusers")] = "diffusers",
    not_private: Annotated[
        bool, typer.Option("--not-private", help="export a generator without a guarantee all the same, stamped as such")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write a generator for other tools: a folder for diffusers and the Hub."""
    from dpsyngen.console import Console
    from dpsyngen.generator.saved import find
    from dpsyngen.privacy.certificate import number
    from dpsyngen.release.bundle import check_against_ledger
    from dpsyngen.release.hub.folder import check_export, export_release
    from dpsyngen.training.run import Run

    check_export(format, out)
    place = find(run)
    if place.run is not None:
        check_against_ledger(Run(place.run))
    done = export_release(place.release, format, out, not_private=not_private)
    c = done.certificate
    Console(quiet, as_json).result(
        {
            "path": done.path,
            "format": done.format,
            "files": done.files,
            "private": c.private,
            "not_private_because": c.not_private_because,
            "epsilon": c.epsilon,
            "delta": c.delta,
            "group_size": c.group_size,
            "certificate_sha256": done.certificate_sha256,
        },
        [
            f"{done.path}: {len(done.files)} files for diffusers",
            f"ε = {number(c.epsilon, up=True)}, δ = {number(c.delta, 3, up=True)} for {c.unit}"
            if c.private and c.epsilon != "inf"
            else f"NOT PRIVATE: {'; '.join(c.not_private_because)}",
            "README.md says how to load it; the Python files in it are code, which a stranger should read first",
        ],
    )
