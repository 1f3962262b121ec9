"""Saved images: both formats hold the pixels of the program, interruptions leave no folder, nothing is overwritten."""

from __future__ import annotations

import hashlib
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dpsyngen.data import load_images
from dpsyngen.errors import ConfigError, RunError
from dpsyngen.files import sync_disk
from dpsyngen.programs import Program, make_program, saving
from dpsyngen.programs.saving import FORMATS, save_images


def program(channels: int = 3) -> Program:
    return make_program("contours", resolution=12, channels=channels, seed=4)


def pixels(data: bytes) -> NDArray[np.uint8]:
    array = np.asarray(Image.open(io.BytesIO(data)))
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def read(out: Path, layout: str) -> dict[int, NDArray[np.uint8]]:
    """Images by index."""
    if layout == "folder":
        return {int(p.stem): pixels(p.read_bytes()) for p in (out / "images").glob("*.png")}
    import pyarrow.parquet as pq

    found = {}
    for path in sorted((out / "data").glob("*.parquet")):
        table = pq.read_table(path)
        features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        assert features["image"] == {"_type": "Image"}
        for row in table.to_pylist():
            assert row["image"]["path"] == f"{row['index']:08}.png"
            found[row["index"]] = pixels(row["image"]["bytes"])
    return found


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_format_holds_the_images(layout: str, channels: int, tmp_path: Path) -> None:
    p = program(channels)
    done: list[int] = []
    manifest = save_images(p, tmp_path / "o", 25, format=layout, start=3, shard_size=10, on_progress=done.append)
    found = read(tmp_path / "o", layout)
    assert sorted(found) == list(range(3, 28))
    assert np.array_equal(np.stack([found[i] for i in range(3, 28)]), p.batch(range(3, 28)))
    assert done == [0, 10, 20, 25]

    about = json.loads(manifest.read_text())
    assert make_program(**about["program"]) == p
    assert (about["prior_tier"], about["count"], about["start"]) == (1, 25, 3)
    parts = [p.batch(range(a, min(a + 10, 28))).tobytes() for a in (3, 13, 23)]
    hashes = [hashlib.sha256(part).hexdigest() for part in parts]
    assert about["shard_sha256"] == hashes
    assert about["sha256"] == hashlib.sha256("".join(hashes).encode()).hexdigest()
    # The files that the manifest names are those that are there, and no working files are left.
    there = {str(f.relative_to(tmp_path / "o")) for f in (tmp_path / "o").rglob("*") if f.is_file()} - {"manifest.json"}
    assert there == {str(f.relative_to(tmp_path / "o")) for name in about["files"] for f in (tmp_path / "o").glob(name)}


def test_workers_write_the_same_bytes(tmp_path: Path) -> None:
    for name, workers in (("one", 1), ("two", 2)):
        save_images(program(), tmp_path / name, 40, format="parquet", shard_size=9, workers=workers)
        assert load_images(tmp_path / name).ignored == ()
    one, two = (
        {f.relative_to(tmp_path / n): f.read_bytes() for f in (tmp_path / n).rglob("*") if f.is_file()}
        for n in ("one", "two")
    )
    assert one == two


@pytest.mark.parametrize("layout", FORMATS)
def test_an_interrupted_job_leaves_nothing_and_can_start_again(layout: str, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int) -> None:
        if done >= 20:
            raise Stop

    out = tmp_path / "folders" / "o"
    with pytest.raises(Stop):
        save_images(program(), out, 30, format=layout, shard_size=10, workers=2, on_progress=stop)
    assert list(out.parent.iterdir()) == []
    save_images(program(), out, 30, format=layout, shard_size=10)
    assert len(read(out, layout)) == 30


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_process_starts_again(kind: signal.Signals, tmp_path: Path, call: Any) -> None:
    """A real command with two workers, really interrupted."""
    out = tmp_path / "o"
    command = [
        *("programs", "save", "fractal", "--out", str(out), "-n", "1500"),
        *("--format", "parquet", "--shard-size", "50", "--resolution", "24", "--workers", "2", "--set", "points=40"),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "dpsyngen", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that a shell started in the background have inherited "ignore".
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while len(list(tmp_path.glob(".o.partial/data/*.parquet"))) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(kind)
    _, told = process.communicate()
    assert not out.exists()
    if kind == signal.SIGINT:
        assert process.returncode == 130
        assert "nothing was kept.  Start again with the same command" in told
        assert list(tmp_path.iterdir()) == []
    code, _, err = call(*command, "--resume")
    assert code == 0, err
    assert list(tmp_path.iterdir()) == [out]
    about = json.loads((out / "manifest.json").read_text())
    whole = make_program(**about["program"])
    for shard in (0, 7, 29):
        digest = hashlib.sha256(whole.batch(range(50 * shard, 50 * shard + 50)).tobytes()).hexdigest()
        assert about["shard_sha256"][shard] == digest
    assert len(list(out.glob("data/*.parquet"))) == 30


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "o"
    save_images(program(), out, 5)
    before = {f: f.read_bytes() for f in out.rglob("*.*") if f.is_file()}
    with pytest.raises(RunError, match="not an empty folder"):
        save_images(program(), out, 5)
    assert {f: f.read_bytes() for f in out.rglob("*.*") if f.is_file()} == before
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path / "file", tmp_path / "file" / "o"):
        with pytest.raises(RunError, match="Choose another"):
            save_images(program(), taken, 5)
    assert (tmp_path / "file").read_text() == "mine"


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    def again(done: int) -> None:
        save_images(program(), tmp_path / "o", 30, shard_size=10)

    with pytest.raises(RunError, match="another process is writing"):
        save_images(program(), tmp_path / "o", 30, shard_size=10, on_progress=again)


def test_only_the_disk_of_the_folder_is_flushed_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush of all disks after each shard waits for whatever other programs write."""
    flushed: list[Path] = []

    def flush(folder: Path) -> None:
        assert len(list((folder / "images").iterdir())) == 30
        assert not (folder / "manifest.json").exists()
        flushed.append(folder)
        sync_disk(folder)

    monkeypatch.setattr(saving, "sync_disk", flush)
    monkeypatch.setattr("os.sync", None)
    save_images(program(), tmp_path / "o", 30, shard_size=10)
    assert len(flushed) == 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"format": "jpeg"}, "'jpeg'.*folder, parquet"),
        ({"count": 0}, "count is 0"),
        ({"count": 2**63, "start": 5}, "count is "),
        ({"start": -1}, "start is -1"),
        ({"workers": 0}, "workers is 0"),
        ({"shard_size": 0}, "shard_size is 0"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    bad: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        save_images(program(), tmp_path / "o", **{"count": 5, **bad})
    assert not (tmp_path / "o").exists()


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"dpsyngen\[parquet\]"):
        save_images(program(), tmp_path / "o", 5, format="parquet")
    assert not (tmp_path / "o").exists()


def test_saved_images_are_a_private_source_too(tmp_path: Path) -> None:
    """Our own readers open what was saved: a stand-in for private images, for trying things out."""
    from dpsyngen.data import load_images

    save_images(program(), tmp_path / "folder", 20)
    save_images(program(), tmp_path / "parquet", 20, format="parquet")
    for source in (tmp_path / "folder" / "images", tmp_path / "parquet" / "data"):
        assert len(load_images(str(source))) == 20
