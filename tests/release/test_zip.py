"""Zips from strangers: everything that a bundle has no use for is refused before anything is unpacked."""

from __future__ import annotations

import io
import stat
import zipfile
from pathlib import Path

import pytest

from dpsyngen.errors import ReleaseError
from dpsyngen.release.bundle import is_safe_name, open_zip, write_zip

CONTENT = {"a.txt": b"hello" * 100, "weights/b.safetensors": bytes(range(256)) * 50, "samples/ä/日本.png": b"png"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_zip(tmp_path / "z.zip", CONTENT.items())
    return tmp_path / "z.zip"


def refused(path: Path, message: str) -> None:
    with pytest.raises(ReleaseError, match=message), open_zip(path):
        pass


def member(name: str, content: bytes = b"x", **attributes) -> bytes:
    """A zip with one sound member and one that is given."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        z.writestr(zipfile.ZipInfo("first.txt"), b"1")
        info = zipfile.ZipInfo("placeholder")
        info.filename = name  # ZipInfo's own constructor would clean it
        for key, value in attributes.items():
            setattr(info, key, value)
        z.writestr(info, content)
    return buffer.getvalue()


def test_what_is_written_is_read_back(path, tmp_path) -> None:
    with open_zip(path) as z:
        assert z.sizes == {name: len(content) for name, content in CONTENT.items()}
        assert {name: z.read(name) for name in z.sizes} == CONTENT
        for name, content in CONTENT.items():
            assert z.extract(name, tmp_path / "out").read_bytes() == content


def test_bytes_depend_on_names_and_contents_only(path, tmp_path) -> None:
    (tmp_path / "file").write_bytes(CONTENT["a.txt"])
    (tmp_path / "file").chmod(0o600)
    again: dict = {**CONTENT, "a.txt": tmp_path / "file"}
    write_zip(tmp_path / "again.zip", again.items())
    assert (tmp_path / "again.zip").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/../../x",
        "/etc/passwd",
        "C:/x",
        "a\\..\\x",
        "a//b",
        "./a",
        "a/.",
        "",
        "a\n",
        "a\x1b[2J",
        "x" * 300,
        "/".join(["x" * 204] * 5) + "x",  # 1,025 bytes
        "a/",
    ],
)
def test_names_that_lead_elsewhere(name, tmp_path) -> None:
    assert not is_safe_name(name)
    assert is_safe_name("/".join(["x" * 204] * 5))
    if name:
        (tmp_path / "z.zip").write_bytes(member(name))
        refused(tmp_path / "z.zip", "not allowed")


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"external_attr": (stat.S_IFLNK | 0o777) << 16}, "not a plain file"),
        ({"external_attr": (stat.S_IFDIR | 0o755) << 16}, "not a plain file"),
        ({"external_attr": (stat.S_IFIFO | 0o644) << 16}, "not a plain file"),
        ({"compress_type": zipfile.ZIP_LZMA}, "compressed by method 14"),
        ({"compress_type": zipfile.ZIP_BZIP2}, "compressed by method 12"),
        ({"comment": b"secret"}, "has a comment"),
        ({"extra": b"\x99\x99\x06\x00secret"}, "has extra fields"),
    ],
)
def test_members_that_are_no_plain_files(attributes, message, tmp_path) -> None:
    (tmp_path / "z.zip").write_bytes(member("x.txt", **attributes))
    refused(tmp_path / "z.zip", message)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["first.txt", "FIRST.TXT"])
def test_two_members_of_one_name(name, tmp_path) -> None:
    (tmp_path / "z.zip").write_bytes(member(name))
    refused(tmp_path / "z.zip", "there twice")


def test_encrypted_members(path, tmp_path) -> None:
    data = bytearray(member("x.txt"))
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.rfind(magic) + offset] |= 1
    (tmp_path / "e.zip").write_bytes(data)
    refused(tmp_path / "e.zip", "encrypted")


def test_bytes_that_belong_to_no_member(path, tmp_path) -> None:
    data = path.read_bytes()
    directory = data.index(b"PK\x01\x02")
    second = data.index(b"PK\x03\x04", 10)
    end = data.rindex(b"PK\x05\x06")
    shifted = bytearray(data[:directory] + b"secret" + data[directory:])
    shifted[end + 6 + 16 : end + 6 + 20] = (directory + 6).to_bytes(4, "little")
    hidden = tmp_path / "h.zip"
    for content in (b"secret" + data, data + b"secret", data[:second] + b"secret" + data[second:], bytes(shifted)):
        hidden.write_bytes(content)
        with pytest.raises(ReleaseError, match=r"belong to nothing|is not a zip file"), open_zip(hidden):
            pass


def test_member_without_a_name(tmp_path) -> None:
    """On which zipfile itself stumbles."""
    data = bytearray(member("x"))
    for magic, offset in ((b"PK\x03\x04", 26), (b"PK\x01\x02", 28)):
        at = data.rfind(magic) + offset
        data[at], data[at + 2] = 0, 1  # the letter is an extra field now
    (tmp_path / "z.zip").write_bytes(data)
    with pytest.raises(ReleaseError), open_zip(tmp_path / "z.zip"):
        pass


def test_comment_of_the_archive(tmp_path) -> None:
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as z:
        z.writestr("a", b"1")
        z.comment = b"secret"
    refused(tmp_path / "z.zip", "has a comment")


def test_bombs_are_refused_by_what_they_declare(tmp_path, monkeypatch) -> None:
    import dpsyngen.release.bundle as module

    write_zip(tmp_path / "z.zip", [("a.txt", bytes(1_000_000))])
    assert (tmp_path / "z.zip").stat().st_size < 5000
    monkeypatch.setattr(module, "MOST_BYTES", 999_999)
    refused(tmp_path / "z.zip", "would unpack to 1,000,000")
    monkeypatch.setattr(module, "MOST_BYTES", 10**9)
    monkeypatch.setattr(module, "SMALL", 1000)
    with open_zip(tmp_path / "z.zip") as z, pytest.raises(ReleaseError, match="at most 1,000"):
        z.read("a.txt")
    monkeypatch.setattr(module, "MOST_MEMBERS", 0)
    refused(tmp_path / "z.zip", "members")


def test_members_that_lie_about_their_size(path, tmp_path) -> None:
    """A bomb that declares little: what is read never exceeds what was declared."""
    write_zip(tmp_path / "z.zip", [("a.txt", bytes(100_000))])
    data = bytearray((tmp_path / "z.zip").read_bytes())
    for magic, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = data.index(magic) + offset
        data[at : at + 4] = (500).to_bytes(4, "little")
    (tmp_path / "z.zip").write_bytes(data)
    with open_zip(tmp_path / "z.zip") as z, pytest.raises(ReleaseError):
        assert len(z.read("a.txt")) <= 500


def test_damaged_and_missing_files(path, tmp_path) -> None:
    data = path.read_bytes()
    for cut in (0, 3, 50, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.zip").write_bytes(data[:cut])
        refused(tmp_path / "cut.zip", "not a zip file|belong to nothing")
    refused(tmp_path / "none.zip", "cannot be read")
    refused(tmp_path, "cannot be read")
    flipped = bytearray(data)
    flipped[data.index(b"png")] ^= 1
    (tmp_path / "f.zip").write_bytes(flipped)
    with open_zip(tmp_path / "f.zip") as z, pytest.raises(ReleaseError, match="damaged"):
        z.read("samples/ä/日本.png")
