"""The studio as a server: where it listens, what must be there, and its life."""

from __future__ import annotations

import logging
import socket
import ssl
import warnings
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpsyngen.console import Console
from dpsyngen.errors import ConfigError, require, require_package
from dpsyngen.files import write_text

LOCAL = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class Address:
    """Where the studio listens: at 127.0.0.1 and `port` (0: a free one).

    With `remote` other machines reach it by the name `host`, by TLS with the PEM files `certificate` and `key`.
    """

    host: str = LOCAL[0]
    port: int = 0
    remote: bool = False
    certificate: Path | None = None
    key: Path | None = None

    def check(self) -> None:
        """Raise ConfigError unless it is this machine alone, or TLS and asked for."""
        require(0 <= self.port <= 65_535, "--port", self.port, "from 1 to 65535, or 0 for one that is free")
        if not self.remote:
            allowed = "127.0.0.1; from elsewhere use `ssh -L`, or give --allow-remote, --tls-cert and --tls-key"
            require(self.host in LOCAL, "--host", self.host, allowed)
            return
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(self.certificate or "", self.key)
        except OSError as error:
            given = f"--tls-cert and --tls-key are {self.certificate} and {self.key}, but must be PEM files of"
            why = "a certificate and its private key: with --allow-remote everything is encrypted by TLS"
            raise ConfigError(f"{given} {why} ({error}).") from None
        named = self.host not in ("0.0.0.0", "::", "", "*")
        require(named, "--host", self.host, "the name or address by which browsers reach this machine")

    def bind(self) -> socket.socket:
        """A socket that listens there; ConfigError if that cannot be."""
        try:
            return socket.create_server((self.host, self.port))
        except OSError as error:
            where = f"{self.host}:{self.port}: {error.strerror}"
            raise ConfigError(f"the studio cannot listen at {where}.  Choose another --port or --host.") from None

    def names(self, port: int) -> tuple[str, ...]:
        """What browsers send as Host at `port`: they leave out the one that http or https has by itself."""
        hosts = (self.host.lower(),) if self.remote else LOCAL
        return (*(f"{host}:{port}" for host in hosts), *(hosts if port == (443 if self.remote else 80) else ()))


def show_link(link: str, folder: Path) -> None:
    """Open `link` in the browser by a file in `folder`: whoever uses this machine can read a browser's command line."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    page = folder / "open.html"
    write_text(page, f'<meta http-equiv="refresh" content="0; url={link}">', 0o600)
    webbrowser.open(page.as_uri())


def serve(runs: Path, folders: Sequence[Path], address: Address, console: Console, show: bool) -> None:
    """Serve runs, and images below `folders`, until Ctrl-C.

    `console` is told the links that let a browser in, and with `show` the first one is opened.

    Raises:
        ConfigError: the address is not allowed or taken, a folder is missing, or what the pages need is not installed.
    """
    address.check()
    for folder in folders:
        require(folder.is_dir(), "--folder", folder, "an existing folder")
    require_package("nicegui", "the studio", "studio")
    import nicegui
    import uvicorn
    from fastapi import FastAPI
    from nicegui import ui

    from dpsyngen.studio import overview, run_page, wizard
    from dpsyngen.studio.guard import Guard, Places
    from dpsyngen.studio.look import Studio

    places = Places(runs.resolve(), tuple(folder.resolve() for folder in folders))
    listening = address.bind()
    places.runs.mkdir(parents=True, exist_ok=True)
    studio = Studio(places)
    for pages in (overview, wizard, run_page):
        pages.register(studio)
    application = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    looks: dict[str, Any] = {"favicon": "🔒", "dark": None, "language": "en-US", "tailwind": False}
    # A page that does not answer for as long is given up, with what was typed: busy machines need more than 3 seconds.
    ui.run_with(application, reconnect_timeout=60, show_welcome_message=False, **looks)
    nicegui.app.config.quasar_config["loadingBar"]["skipHijack"] = True  # it would have no name for screen readers
    logging.getLogger("nicegui").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="nicegui")  # it looks at torch's objects, too
    console.note(f"runs are in {places.runs}; images may lie in {', '.join(map(str, places.folders))}")
    console.note("Ctrl-C ends the studio; trainings go on.  This link lets one browser in:")
    names, files = address.names(listening.getsockname()[1]), f"/_nicegui/{nicegui.__version__}/"
    guard = Guard(application, names, address.remote, lambda link: console.result({"link": link}, [link]), files)
    if show:
        show_link(guard.link, places.runs / ".studio")
    tls: dict[str, Any] = {"ssl_certfile": address.certificate, "ssl_keyfile": address.key}
    config = uvicorn.Config(guard, log_level="error", server_header=False, timeout_graceful_shutdown=1, **tls)
    uvicorn.Server(config).run(sockets=[listening])
