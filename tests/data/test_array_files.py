"""Files of arrays that were made by other programs, are damaged or lie."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from dpsyngen.data import load_images
from dpsyngen.errors import DataError
from tests.data.test_arrays import images
from tests.fuzz.properties import zip_of


def test_fortran_order_and_header_versions(tmp_path: Path, rng: np.random.Generator) -> None:
    x = images(rng, 5, 9, 9)
    for array in (x, np.asfortranarray(x)):
        np.save(tmp_path / "a.npy", array)
        np.savez(tmp_path / "a.npz", images=array)
        for name in ("a.npy", "a.npz"):
            assert np.array_equal(load_images(tmp_path / name).images[:, 0], x)
    for version in ((2, 0), (3, 0)):
        with (tmp_path / "b.npy").open("wb") as file:
            np.lib.format.write_array(file, x, version)
        with pytest.raises(DataError, match=r"plain arrays are of \(1, 0\)"):
            load_images(tmp_path / "b.npy")


def npy_header(shape: str, descr: str = "'|u1'", version: int = 1) -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + bytes((version, 0)) + len(text).to_bytes(2 if version == 1 else 4, "little") + text


@pytest.mark.parametrize(
    "header",
    [
        npy_header("(-1, 8, 8)"),
        npy_header("(-2, -8, 8)"),
        npy_header(f"({2**62}, 8, 8)"),
        npy_header(f"({10**30}, 8, 8)"),
        npy_header("(2.0, 8, 8)"),
        npy_header("(2, 8, 8)", "'|O'"),
        npy_header("(2, 8, 8)", "[('a', '|O'), ('b', 'u1')]"),
        npy_header("(2, 8, 8)", "[('a', 'u1'), ('b', 'u1')]"),
        npy_header("(2, 8, 8)", "('u1', (10**9, 10**9))"),
        npy_header("(2, 8, 8)", "__import__('os').system('true')"),
        npy_header("(" * 3000),
        npy_header("(2, 8, 8)", "'|u1'" + " " * 10_000),
        npy_header("(2, 8, 8)", version=4),
        b"\x93NUMPY\x01\x00\xff",
        b"\x93NUMPY",
        b"\x80\x04\x95",  # a pickle
    ],
)
def test_headers_that_lie(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "a.npy").write_bytes(header + bytes(128))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", header + bytes(128))
    for name in ("a.npy", "a.npz"):
        with pytest.raises(DataError) as caught:
            load_images(tmp_path / name)
        assert len(str(caught.value)) < 1000


def test_headers_longer_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy has a limit of the same size, which must not be the only one."""
    (tmp_path / "a.npy").write_bytes(content := npy_header("(2, 8, 8)", "'|u1'" + " " * 100) + bytes(128))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", content)
    monkeypatch.setattr("dpsyngen.data.arrays.MAX_HEADER_BYTES", 100)
    for name in ("a.npy", "a.npz"):
        with pytest.raises(DataError, match="Header info length"):
            load_images(tmp_path / name)


def test_members_that_are_there_twice(tmp_path: Path, rng: np.random.Generator) -> None:
    np.save(tmp_path / "a.npy", images(rng, 2, 8, 8))
    np.save(tmp_path / "other.npy", images(rng, 2, 9, 9))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.write(tmp_path / "a.npy", "images.npy")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.write(tmp_path / "other.npy", "images.npy")
    with pytest.raises(DataError, match="twice"):
        load_images(tmp_path / "a.npz")


def test_members_of_almost_the_same_name_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    """numpy takes "images" and "images.npy" for one key; the size of the wrong one would then be checked."""
    x = images(rng, 2, 8, 8)
    np.save(tmp_path / "a.npy", x)
    np.save(tmp_path / "other.npy", images(rng, 2, 9, 9))
    for names in (("images", "images.npy"), ("images.npy", "images")):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            for name in names:
                archive.write(tmp_path / ("a.npy" if name.endswith(".npy") else "other.npy"), name)
        with pytest.raises(DataError, match="'images' is in it twice"):
            load_images(tmp_path / "a.npz")


def test_members_with_paths_lead_nowhere(tmp_path: Path, rng: np.random.Generator) -> None:
    np.save(tmp_path / "a.npy", images(rng, 2, 8, 8))
    inner = tmp_path / "in"
    inner.mkdir()
    content = (tmp_path / "a.npy").read_bytes()
    names = ("../../images.npy", "/images.npy", "..\\images.npy")
    (inner / "a.npz").write_bytes(zip_of([(name, content) for name in names]))
    with pytest.raises(DataError, match="no images"):
        load_images(inner / "a.npz")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.npy", "a.npz", "in"]


def test_other_compressions_and_passwords_are_refused(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "a.npy", images(rng, 2, 8, 8))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.write(tmp_path / "a.npy", "images.npy")
        archive.write(tmp_path / "a.npy", "other.npy", zipfile.ZIP_LZMA)
    # Not even to look for labels is such a member opened: its dictionary may be of any size.
    monkeypatch.setattr("zipfile.LZMADecompressor", lambda: pytest.fail("opened"))
    with pytest.warns(UserWarning, match="other"):
        assert len(load_images(tmp_path / "a.npz")) == 2
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
            archive.write(tmp_path / "a.npy", "images.npy")
        with pytest.raises(DataError, match="savez_compressed"):
            load_images(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.write(tmp_path / "a.npy", "images.npy")
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[6] |= 1  # "encrypted", in both headers
    content[content.rfind(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match="password"):
        load_images(tmp_path / "a.npz")


def test_a_member_longer_or_shorter_than_its_header_says(tmp_path: Path) -> None:
    for size in (127, 129):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("images.npy", npy_header("(2, 8, 8)") + bytes(size))
        with pytest.raises(DataError, match="damaged or truncated"):
            load_images(tmp_path / "a.npz")


def test_a_renamed_npz_file_says_so(tmp_path: Path, rng: np.random.Generator) -> None:
    np.savez(tmp_path / "a.npz", images=images(rng, 2, 8, 8))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with pytest.raises(DataError, match=r"is a \.npz file by its content\. Rename it"):
        load_images(tmp_path / "a.npy")
