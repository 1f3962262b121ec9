"""What the studio may touch and where it listens: each is refused before anything is served."""

from __future__ import annotations

import asyncio
import os
import ssl
import sys
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from PIL import Image

from dpsyngen.config import Config, load_config
from dpsyngen.errors import ConfigError, RunError
from dpsyngen.studio.guard import Places
from dpsyngen.studio.serve import Address, show_link
from dpsyngen.training.progress import Jobs
from tests.studio.served import LARGEST, MISSING, ROOT, Served


@pytest.fixture
def places(tmp_path: Path) -> Places:
    for name in ("home/photos", "home/runs", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "elsewhere/secret.npz").write_bytes(b"")
    (tmp_path / "home/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "home/runs/linked").symlink_to(tmp_path / "elsewhere")
    return Places(tmp_path / "home/runs", (tmp_path / "home",))


@pytest.mark.parametrize(
    "text",
    ["../elsewhere", "photos/../../elsewhere", "/", "/etc/passwd", "~", "link", "link/secret.npz", "./link/../link"],
)
def test_no_path_outside_the_folders(places: Places, text: str) -> None:
    with pytest.raises(ConfigError, match=r"outside the folders .*--folder"):
        places.inside(text, "the images")
    with pytest.raises(ConfigError, match="outside the folders"):
        places.source(text)


def test_paths_inside_are_found(places: Places) -> None:
    home = places.folders[0]
    assert places.inside("photos", "x") == places.inside(str(home / "photos"), "x") == home / "photos"
    assert places.source("digits") == "digits:train"
    (home / "digits").mkdir()
    assert places.source("digits") == str(home / "digits")
    with pytest.raises(ConfigError, match="there is nothing at"):
        places.source("photographs")
    for wrong in ("", "  ", "a\0b"):
        with pytest.raises(ConfigError):
            places.inside(wrong, "x")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../elsewhere", "a/b", "/etc", ".studio", " a", "a\n", "a?b", "a%2fb", "linked", "x" * 300]
)
def test_a_run_is_a_folder_in_the_folder_of_runs(places: Places, name: str) -> None:
    with pytest.raises(ConfigError, match="the name of the run"):
        places.path_of(name)
    assert places.path_of("digits-1") == places.runs / "digits-1"
    assert places.path_of("ε = 3") == places.runs / "ε = 3"


def test_runs_with_names_that_the_command_line_alone_takes_are_left_out(places: Places) -> None:
    for name in ("a", "50%", "mnist#2", ".hidden", "linked"):
        (places.runs / name).mkdir(exist_ok=True)
        (places.runs / name / "run.json").write_text("{}")
    assert places.names() == ["a"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "board.example", ""])
def test_another_address_is_refused(host: str, call, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be 127\.0\.0\.1.*--allow-remote"):
        Address(host).check()
    code, out, err = call("studio", "--no-browser", "--host", host, "--runs", tmp_path / "runs")
    assert code == 2
    assert "127.0.0.1" in err
    assert "token" not in out
    assert not (tmp_path / "runs").exists()


def test_others_are_let_in_by_tls_alone(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    for address in (Address("board.example", 0, True), Address("board.example", 0, True, certificate, key)):
        with pytest.raises(ConfigError, match=r"--tls-cert .*encrypted by TLS"):
            address.check()
    self_signed(certificate, tmp_path / "other.pem")
    with pytest.raises(ConfigError, match="--tls-key"):
        Address("board.example", 0, True, certificate).check()
    key.touch()
    with pytest.raises(ConfigError, match="PEM files of a certificate and its private key"):
        Address("board.example", 0, True, certificate, key).check()
    self_signed(certificate, key)
    Address("board.example", 8080, True, certificate, key).check()
    with pytest.raises(ConfigError, match="by which browsers reach"):
        Address("0.0.0.0", 8080, True, certificate, key).check()


def self_signed(certificate: Path, key: Path) -> None:
    """Write a certificate for ``localhost`` and its private key."""
    private, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    made = x509.CertificateBuilder(name, name, private.public_key(), 1, now, now + timedelta(days=1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    certificate.write_bytes(made.sign(private, hashes.SHA256()).public_bytes(Encoding.PEM))
    key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


@pytest.mark.skipif("nicegui" in MISSING, reason="nicegui is not installed")
def test_others_get_the_page_by_tls_with_a_secure_cookie(tmp_path: Path) -> None:
    self_signed(tmp_path / "cert.pem", tmp_path / "key.pem")
    served = Served(
        tmp_path, "--allow-remote", *["--host", "localhost", "--tls-cert", "cert.pem", "--tls-key", "key.pem"]
    )
    try:
        trusted = ssl.create_default_context(cafile=tmp_path / "cert.pem")
        assert served.address.startswith("https://localhost:")
        with urllib.request.urlopen(served.link, context=trusted, timeout=60) as answer:
            assert "; Secure" in answer.headers["set-cookie"]
        with pytest.raises(OSError):  # noqa: PT011
            urllib.request.urlopen(served.link.replace("https", "http"), timeout=60)
    finally:
        served.end()


def test_the_token_is_not_in_the_command_line_of_the_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    show_link("http://127.0.0.1:8080/?token=abc", tmp_path / "runs/.studio")
    page = tmp_path / "runs/.studio/open.html"
    assert opened == [page.as_uri()]
    assert "?token=abc" in page.read_text(encoding="utf-8")
    assert (page.stat().st_mode & 0o777, page.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_the_port_that_browsers_leave_out_may_be_missing() -> None:
    here, there = Address(), Address("Board.example", remote=True)
    assert here.names(80) == ("127.0.0.1:80", "localhost:80", "127.0.0.1", "localhost")
    assert there.names(443) == ("board.example:443", "board.example")
    assert here.names(443) == ("127.0.0.1:443", "localhost:443")
    assert there.names(80) == ("board.example:80",)


def test_it_listens_on_this_machine_alone(call, tmp_path: Path) -> None:
    with Address().bind() as listening:
        assert listening.getsockname()[0] == "127.0.0.1"
        with pytest.raises(ConfigError, match="cannot listen"):
            Address(port=listening.getsockname()[1]).bind()
        runs = ("--runs", tmp_path / "runs")
        code, _, err = call("studio", "--no-browser", "--port", listening.getsockname()[1], *runs)
    assert (code, "cannot listen" in err, list(tmp_path.iterdir())) == (2, True, [])


def test_a_folder_that_is_missing_is_told(call, tmp_path: Path) -> None:
    code, _, err = call("studio", "--no-browser", "--folder", tmp_path / "no")
    assert code == 2
    assert "--folder" in err


def test_without_its_packages_it_says_what_to_install(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nicegui", None)
    code, _, err = call("studio", "--no-browser", "--runs", tmp_path / "runs")
    assert code == 2
    assert "pip install 'dpsyngen[studio]'" in err


def settings(source: str) -> Config:
    return load_config({"data": {"source": source}, "stages": {"variant": "instant"}})


@pytest.mark.slow
def test_two_tabs_do_not_start_one_run_twice(tmp_path: Path) -> None:
    jobs, path, config = Jobs(tmp_path / ".studio"), tmp_path / "r", settings("digits")
    jobs.train(path, config)
    try:
        with pytest.raises(RunError, match="going on already"):
            jobs.train(path, config)
        said, progress = jobs.look(path)
        assert said.going
        assert progress is None
    finally:
        jobs.stop(path)
        jobs._started[tmp_path / ".studio/r.log"].wait(60)
    said, progress = jobs.look(path)
    assert not said.going
    assert said.error is None
    assert os.stat(tmp_path / ".studio").st_mode & 0o077 == 0
    assert os.stat(tmp_path / ".studio/r.log").st_mode & 0o077 == 0


@pytest.mark.slow
def test_why_a_training_could_not_begin_is_told(tmp_path: Path) -> None:
    jobs, path = Jobs(tmp_path / ".studio"), tmp_path / "r"
    jobs.train(path, settings(str(tmp_path / "none")))
    jobs._started[tmp_path / ".studio/r.log"].wait(60)
    said, progress = jobs.look(path)
    assert progress is None
    assert said.error is not None
    assert "neither a file or folder nor a named set" in said.error
    with pytest.raises(RunError, match="no training of this run"):
        jobs.stop(path)


@pytest.mark.skipif("nicegui" in MISSING, reason="nicegui is not installed")
def test_a_run_of_another_format_hides_no_other_run(places: Places, tmp_path: Path) -> None:
    from nicegui import Client, core
    from nicegui.page import page

    from dpsyngen.studio.overview import _row

    (places.runs / "old").mkdir()
    (places.runs / "old/run.json").write_text('{"format": 999}')
    studio: Any = SimpleNamespace(places=places, jobs=Jobs(tmp_path / "jobs"))

    async def rows() -> None:
        core.loop = asyncio.get_running_loop()
        with Client(page("/")):
            for name in places.names():
                row = _row(studio, name).parent_slot
                assert row is not None
                assert "damaged" in str([getattr(cell, "content", "") for cell in row.children])

    asyncio.run(rows())


@pytest.mark.skipif("nicegui" in MISSING, reason="nicegui is not installed")
def test_a_page_tells_a_defect_and_does_not_wait_for_ever() -> None:
    from nicegui import Client, core
    from nicegui.page import page

    from dpsyngen.studio.look import Notice

    async def broken() -> None:
        raise KeyError("weights")

    async def press() -> Notice:
        core.loop = asyncio.get_running_loop()
        with Client(page("/")):
            notice = Notice()
            with pytest.raises(KeyError):  # to the terminal
                await notice.attempt("drawing …", broken)
        return notice

    notice = asyncio.run(press())
    assert not notice._going.default_slot.children
    (told,) = notice._wrong.default_slot.children
    assert "a defect of the studio" in told.content


def test_the_pictures_of_the_documentation_are_small() -> None:
    pictures = sorted((ROOT / "docs/studio").glob("*.png"))
    assert len(pictures) >= 8
    for path in pictures:
        assert path.stat().st_size < LARGEST
        with Image.open(path) as picture:
            assert np.asarray(picture.convert("L")).std() > 5, f"{path.name} is blank"
