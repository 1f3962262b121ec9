"""The command `dpsyngen studio`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpsyngen.cli.options import AsJson, Quiet


def studio(
    runs: Annotated[Path, typer.Option(help="folder of run directories")] = Path("runs"),
    folder: Annotated[
        list[Path] | None,
        typer.Option(help="folder in which images and other files may lie; again for more; default: this one"),
    ] = None,
    port: Annotated[int, typer.Option(help="0: one that is free")] = 0,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="open the link in the browser")] = True,
    host: Annotated[str, typer.Option(help="with --allow-remote: how browsers reach this machine")] = "127.0.0.1",
    allow_remote: Annotated[bool, typer.Option("--allow-remote", help="let other machines in, by TLS")] = False,
    tls_cert: Annotated[Path | None, typer.Option(help="certificate (PEM), for --allow-remote")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="its private key (PEM)")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Open a page in the browser that leads from a folder of images to a signed bundle; see docs/studio.md."""
    from dpsyngen.console import Console
    from dpsyngen.files import expanded
    from dpsyngen.studio.places import Places
    from dpsyngen.studio.serve import Address, serve

    places = Places(expanded(runs).resolve(), tuple(expanded(f).resolve() for f in folder or [Path()]))
    serve(places, Address(host, port, allow_remote, tls_cert, tls_key), Console(quiet, as_json), browser)
