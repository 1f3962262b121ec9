"""What the studio offers of a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("nicegui")


def test_every_kind_of_file_that_is_read_is_offered(tmp_path: Path) -> None:
    from dpsyngen.studio.wizard import found_in

    read = ["a.npz", "b.npy", "c.parquet", "d.tar", "e.arrow", "f-idx3-ubyte", "g-idx3-ubyte.gz", "h.NPZ"]
    for name in [*read, "f-idx1-ubyte", "notes.txt", ".hidden.npz"]:
        (tmp_path / name).touch()
    for folder in ("photos", "runs", "_site"):
        (tmp_path / folder).mkdir()
    assert found_in(tmp_path, tmp_path / "runs") == [*read, "photos"]
