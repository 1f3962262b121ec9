"""Who may speak to the studio, and which files it touches.

The guard is a layer around the application that sees every request, websockets included, first.

A page of another site can make a browser send requests to 127.0.0.1, hence three checks, each on its own: of the Host
(against a name that a stranger points here), of Origin and Sec-Fetch-Site, and of a cookie, which a browser gets for
the token in the link that the terminal shows.  A link is good for one browser.  No answer but the library's own files
is stored by the browser, framed, or loads anything from elsewhere.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import HTTPConnection
from starlette.responses import HTMLResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from dpsyngen.data.named import parse_name
from dpsyngen.errors import ConfigError, listed, printable, require
from dpsyngen.files import expanded
from dpsyngen.training.run import Run

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'"
)
"""Nothing comes from elsewhere; Vue compiles its templates in the browser, hence 'unsafe-eval'."""

_HEADERS = {
    "content-security-policy": POLICY,
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
_PAGE = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">{head}<title>dpsyngen studio</title></head>'
    '<body style="font: 16px/1.5 system-ui, sans-serif; margin: 3rem auto; max-width: 40rem; padding: 0 1rem">'
    "<h1>dpsyngen studio</h1><p>{text}</p></body></html>"
)

_UNKNOWN = (
    "This browser is not known here.  Open the link that the terminal shows in which <code>dpsyngen studio</code> "
    "runs: it is good for one browser, and a new one is shown when it was used."
)


class Guard:
    """The ASGI application `app`, for those who may use it.

    `hosts` may stand in the header Host (``127.0.0.1:8080``; the first one is in the link); `secure`: served by TLS;
    `announce` is told each link as it becomes valid; below the path `storable` lie the library's scripts and styles.
    """

    def __init__(
        self, app: ASGIApp, hosts: tuple[str, ...], secure: bool, announce: Callable[[str], None], storable: str
    ) -> None:
        self.app, self.hosts, self.announce, self.storable = app, hosts, announce, storable
        self.scheme = "https" if secure else "http"
        self.cookie = f"dpsyngen_studio_{hosts[0].rpartition(':')[2]}"  # cookies do not know ports
        self._secret = secrets.token_urlsafe(32)
        self.link = ""
        self._renew()

    def _renew(self) -> None:
        self._token = secrets.token_urlsafe(32)
        self.link = f"{self.scheme}://{self.hosts[0]}/?token={self._token}"
        self.announce(self.link)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        asked = HTTPConnection(scope)
        token = asked.query_params.get("token", "")
        arrives = scope["type"] == "http" and scope["method"] == "GET" and scope["path"] == "/" and bool(token)
        problem = self._wrong_host(asked) or self._wrong_origin(asked, arrives)
        if problem is None and arrives and hmac.compare_digest(token.encode(), self._token.encode()):
            # Not a redirect: where the link was followed from another site, that would come without the new cookie.
            head, text = '<meta http-equiv="refresh" content="0; url=/">', 'Opening … <a href="/">go on</a>'
            page, secure = HTMLResponse(_PAGE.format(head=head, text=text), headers=_HEADERS), self.scheme == "https"
            page.set_cookie(self.cookie, self._secret, httponly=True, samesite="strict", secure=secure)
            await page(scope, receive, send)
            self._renew()
            return
        if problem is None and not self._known(asked):
            problem = _UNKNOWN
        if problem is None:
            await self.app(scope, receive, self._marked(scope, send))
        elif scope["type"] == "websocket":
            await WebSocketClose(1008, "refused")(scope, receive, send)
        else:
            await HTMLResponse(_PAGE.format(head="", text=problem), 403, _HEADERS)(scope, receive, send)

    def _wrong_host(self, asked: HTTPConnection) -> str | None:
        hosts = asked.headers.getlist("host")
        if hosts and all(host.lower() in self.hosts for host in hosts):
            return None
        return f"Refused: that is not the studio's name.  It is at {self.scheme}://{self.hosts[0]}/"

    def _wrong_origin(self, asked: HTTPConnection, arrives: bool) -> str | None:
        own = [f"{self.scheme}://{host.lower()}" for host in asked.headers.getlist("host")]
        origins, sites = asked.headers.getlist("origin"), asked.headers.getlist("sec-fetch-site")
        changes = asked.scope["type"] == "websocket" or asked.scope["method"] not in ("GET", "HEAD")
        foreign = any(o.lower() not in own for o in origins) or (changes and not origins)
        foreign |= not arrives and any(s not in ("same-origin", "none") for s in sites)
        return "Refused: another site asked for this." if foreign else None

    def _known(self, asked: HTTPConnection) -> bool:
        return hmac.compare_digest(asked.cookies.get(self.cookie, "").encode(), self._secret.encode())

    def _marked(self, scope: Scope, send: Send) -> Send:
        """`send`, with our headers in place of those of the same name."""
        ours = dict(_HEADERS)
        if scope["path"].startswith(self.storable):
            del ours["cache-control"]

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [(k, v) for k, v in message.get("headers", ()) if k.decode("latin-1").lower() not in ours]
                message["headers"] = [*kept, *((k.encode(), v.encode()) for k, v in ours.items())]
            await send(message)

        return marked


@dataclass(frozen=True)
class Places:
    """The folder of runs, and the folders in which images and other files may lie; all of them resolved.

    The studio touches what is below them, and nothing else.
    """

    runs: Path
    folders: tuple[Path, ...]

    def inside(self, text: str, what: str) -> Path:
        """The path `text` (relative: to the first folder), without links; ConfigError if it leads outside."""
        require(text.strip(), what, text, "the path of a file or folder")
        try:
            path = (self.folders[0] / expanded(text.strip())).resolve()
        except (OSError, ValueError, RuntimeError):
            raise ConfigError(f"{what} is {printable(text)!r}, which cannot be a path.") from None
        if any(path.is_relative_to(folder) for folder in (self.runs, *self.folders)):
            return path
        raise ConfigError(
            f"{what} is {printable(text)!r}, which is outside the folders that the studio may use: "
            f"{listed(self.folders)}.  Choose a path inside, or start it with `dpsyngen studio --folder FOLDER`."
        )

    def short(self, path: Path) -> str:
        """A path as :meth:`inside` takes it, relative where it can be."""
        return str(path.relative_to(self.folders[0]) if path.is_relative_to(self.folders[0]) else path)

    def source(self, text: str, what: str = "the images") -> str:
        """Images as :func:`dpsyngen.load_images` takes them: a named set, or a path that is :meth:`inside`."""
        named = parse_name(text.strip())
        if named is not None and not (self.folders[0] / text.strip()).exists():
            return ":".join(named)
        path = self.inside(text, what)
        if not path.exists():
            raise ConfigError(
                f"{what}: there is nothing at {printable(path)}.  Give a folder or file of images, or a public set: "
                "digits, fashion-mnist, mnist or cifar10."
            )
        return str(path)

    def path_of(self, name: str) -> Path:
        """Where the run `name` is, or would be; ConfigError unless that is a plain name."""
        what = "the name of the run"
        plain = name.strip() == name and name not in ("", ".", "..") and not name.startswith(".")
        ok = plain and not any(c in "/\\%?#" or not c.isprintable() for c in name) and len(name.encode()) <= 200
        require(ok, what, name, "a plain name such as digits-1, without / and not beginning with a dot")
        path = self.runs / name
        require(path.resolve() == path, what, name, "the name of a folder, not of a link")
        return path

    def run(self, name: str) -> Run:
        """The run `name`; RunError if there is none."""
        return Run(self.path_of(name))

    def names(self) -> list[str]:
        """All runs, the newest first; those with names that :meth:`path_of` refuses are for the command line."""
        found = []
        for about in self.runs.glob("*/run.json"):
            with contextlib.suppress(ConfigError):
                found.append(self.path_of(about.parent.name))
        return [p.name for p in sorted(found, key=lambda p: (p / "run.json").stat().st_mtime, reverse=True)]
