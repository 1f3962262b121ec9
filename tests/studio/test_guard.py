"""The layer around the studio: who gets through, and that each of its checks is needed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("starlette", reason="comes with nicegui")

from dpsyngen.studio.guard import POLICY, Guard

OWN = "http://127.0.0.1:8080"
STORABLE = "/_lib/"


async def application(scope: Any, receive: Any, send: Any) -> None:
    """What is behind the guard: a page that may be stored, and a websocket that takes everybody."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        return
    headers = [(b"Cache-Control", b"public, max-age=31536000"), (b"content-type", b"text/html")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"secret"})


class Asked:
    """What came back."""

    def __init__(self, sent: list[dict[str, Any]]) -> None:
        self.status = {"websocket.accept": 101, "websocket.close": 403}.get(sent[0]["type"], sent[0].get("status"))
        self.headers = {k.decode().lower(): v.decode() for k, v in sent[0].get("headers", ())}
        self.body = b"".join(m.get("body", b"") for m in sent)


def ask(guard: Guard, path: str = "/", method: str = "GET", kind: str = "http", query: str = "", **given: str) -> Asked:
    sent: list[dict[str, Any]] = []
    headers = {"host": "127.0.0.1:8080", **{k.replace("_", "-"): v for k, v in given.items() if v}}
    scope = {"type": kind, "path": path, "method": method, "query_string": query.encode()}
    scope["headers"] = [(k.encode(), v.encode()) for k, v in headers.items()]

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(guard(scope, receive, send))
    return Asked(sent)


@pytest.fixture
def links() -> list[str]:
    return []


@pytest.fixture
def guard(links: list[str]) -> Guard:
    return Guard(application, ("127.0.0.1:8080", "localhost:8080"), False, links.append, STORABLE)


def enter(guard: Guard) -> str:
    """The cookie of a browser that followed the link."""
    came = ask(guard, query=guard.link.partition("?")[2], sec_fetch_site="none")
    assert came.status == 200
    return came.headers["set-cookie"].partition(";")[0]


def test_the_link_lets_one_browser_in_and_the_next_link_is_told(guard: Guard, links: list[str]) -> None:
    first = guard.link
    cookie = enter(guard)
    assert ask(guard, cookie=cookie).body == b"secret"
    assert len(links) == 2
    assert links[1] != first
    again = ask(guard, query=first.partition("?")[2])
    assert again.status == 403
    assert b"secret" not in again.body
    assert "set-cookie" not in again.headers


def test_the_cookie_is_for_this_site_alone_and_not_for_scripts(guard: Guard) -> None:
    came = ask(guard, query=guard.link.partition("?")[2])
    words = [w.strip() for w in came.headers["set-cookie"].split(";")]
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(words)
    assert "Secure" not in words
    safe = Guard(application, ("board.example:8080",), True, lambda link: None, STORABLE)
    came = ask(safe, query=safe.link.partition("?")[2], host="board.example:8080")
    assert "; Secure" in came.headers["set-cookie"]
    assert safe.link.startswith("https://")


def test_the_token_is_not_in_the_answer(guard: Guard) -> None:
    token = guard.link.partition("token=")[2]
    came = ask(guard, query=f"token={token}")
    assert token.encode() not in came.body
    assert token not in str(came.headers)


REFUSED: dict[str, tuple[dict[str, str], str]] = {
    "no token and no cookie": ({"cookie": ""}, "_known"),
    "another cookie": ({"cookie": "dpsyngen_studio_8080=guessed"}, "_known"),
    "a wrong token": ({"cookie": "", "query": "token=guessed"}, "_known"),
    "a websocket without the cookie": ({"cookie": "", "kind": "websocket", "origin": OWN}, "_known"),
    "a name that was pointed here": ({"host": "evil.example:8080"}, "_wrong_host"),
    "the right name at another port": ({"host": "127.0.0.1:80"}, "_wrong_host"),
    "a websocket by another name": (
        {"host": "evil.example:8080", "origin": "http://evil.example:8080", "kind": "websocket"},
        "_wrong_host",
    ),
    "a form of another site": ({"method": "POST", "origin": "http://evil.example"}, "_wrong_origin"),
    "a form of another port": ({"method": "POST", "origin": "http://127.0.0.1:8888"}, "_wrong_origin"),
    "a form of no site": ({"method": "POST"}, "_wrong_origin"),
    "a form of a page without an origin": ({"method": "POST", "origin": "null"}, "_wrong_origin"),
    "a script of another site": ({"origin": "http://evil.example"}, "_wrong_origin"),
    "an image in a page of another port": ({"sec_fetch_site": "same-site"}, "_wrong_origin"),
    "a websocket of another site": ({"kind": "websocket", "origin": "http://evil.example"}, "_wrong_origin"),
    "a websocket of another port": ({"kind": "websocket", "origin": "http://127.0.0.1:8888"}, "_wrong_origin"),
    "a websocket of no site": ({"kind": "websocket"}, "_wrong_origin"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_and_only_by_the_check_that_is_for_it(what: str, guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    given, check = REFUSED[what]
    given = {"cookie": enter(guard), **given}
    came = ask(guard, **given)
    assert came.status == 403
    assert b"secret" not in came.body
    # Without that check it gets through: so nothing else would have kept it out.
    monkeypatch.setattr(Guard, check, lambda *args: check == "_known" or None)
    assert ask(guard, **given).status in (200, 101)


def test_what_the_studio_itself_asks_for_gets_through(guard: Guard) -> None:
    cookie = enter(guard)
    assert ask(guard, cookie=cookie, sec_fetch_site="same-origin").status == 200
    assert ask(guard, cookie=cookie, method="POST", origin=OWN).status == 200
    assert ask(guard, cookie=cookie, kind="websocket", origin=OWN).status == 101
    assert ask(guard, cookie=f"other=1; {cookie}", host="localhost:8080").status == 200
    assert ask(guard, cookie=cookie, host="LOCALHOST:8080", origin="http://localhost:8080").status == 200


def test_nothing_but_the_librarys_files_is_stored_or_framed(guard: Guard) -> None:
    cookie = enter(guard)
    for came in (ask(guard, cookie=cookie), ask(guard, "/upload/x", "POST", cookie=cookie, origin=OWN), ask(guard)):
        assert came.headers["cache-control"] == "no-store"
        assert came.headers["x-frame-options"] == "DENY"
        assert came.headers["content-security-policy"] == POLICY
        assert came.headers["referrer-policy"] == "no-referrer"
    assert "http" not in POLICY
    assert "max-age" in ask(guard, f"{STORABLE}vue.js", cookie=cookie).headers["cache-control"]
