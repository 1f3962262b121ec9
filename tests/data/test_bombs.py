"""Memory: small files that ask for a lot of it, measured in a process of their own."""

from __future__ import annotations

import gzip
import json
import struct
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpsyngen.data.store import PixelBudget
from tests.data.test_hostile_images import blank_png

pytestmark = pytest.mark.slow

_MEASURE = """
import json, os, resource, sys
os.sched_getaffinity = lambda process: range(8)  # so many threads, wherever this runs
import numpy as np
from PIL import Image
from dpsyngen.data import decode, load_images
from dpsyngen.data.store import PixelBudget
from dpsyngen.errors import DataError
decode.MAX_PIXELS = int(sys.argv[3])
decode.BUDGET = PixelBudget(decode.MAX_PIXELS)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    said = str(load_images(sys.argv[1], **json.loads(sys.argv[2])).images.shape)
except DataError as error:
    said = str(error)
print(json.dumps([said, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024]))
"""


def measured(source: Path, max_pixels: int = 2**26, **options: Any) -> tuple[str, float]:
    """What is said of a source, and the MiB that it takes at most."""
    command = [
        sys.executable,
        "-W",
        "ignore:most images are nearly black",
        "-c",
        _MEASURE,
        str(source),
        json.dumps(options),
        str(max_pixels),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    said, megabytes = json.loads(done.stdout)
    return said, megabytes


@pytest.mark.parametrize(("depth", "colour", "channels"), [(8, 6, 3), (16, 0, 1)])
def test_many_large_images_take_what_one_takes(tmp_path: Path, depth: int, colour: int, channels: int) -> None:
    """At a quarter of the limit on pixels, so that it takes a quarter of the time and of the memory."""
    content = blank_png(4096, 4096, depth, colour)
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(content)
    said, megabytes = measured(tmp_path, 2**24, resolution=8)
    assert said == f"(6, {channels}, 8, 8)"
    assert megabytes < 256, megabytes


def test_image_over_the_limit_takes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(blank_png(8193, 8192, 1))
    said, megabytes = measured(tmp_path)
    assert "bomb" in said
    assert megabytes < 100


def test_header_bombs(tmp_path: Path) -> None:
    """A header of 1 GiB of spaces, which numpy would read before it looks at its length."""
    start = b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**30)
    with (tmp_path / "a.npy").open("wb") as file:
        file.write(start)
        file.truncate(2**30 + 1000)  # takes no room on the disk
    with (
        zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("images.npy", "w", force_zip64=True) as member,
    ):
        member.write(start)
        for _ in range(64):
            member.write(b" " * 2**20)
    for name in ("a.npy", "a.npz"):
        said, megabytes = measured(tmp_path / name)
        assert "it is of .npy version (2, 0)" in said
        assert megabytes < 50


def test_gzip_bomb(tmp_path: Path) -> None:
    head = bytes((0, 0, 8, 3)) + struct.pack(">3I", 2, 8, 8)
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb", 1) as file:
        file.write(head)
        for _ in range(300):
            file.write(bytes(2**20))
    said, megabytes = measured(tmp_path / "train-images-idx3-ubyte.gz", labels=False)
    assert "more or fewer" in said
    assert megabytes < 50


def test_npz_takes_its_memory_once(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((4000, 256, 256), dtype=np.uint8))
    said, megabytes = measured(tmp_path / "a.npz", resolution=256)
    assert said == "(4000, 1, 256, 256)"
    assert megabytes < 250 * 1.2


def test_pixel_budget_lets_no_more_in_than_fit() -> None:
    budget = PixelBudget(100)
    inside, most, lock = [0], [0], threading.Lock()
    spent = []

    def work(pixels: int) -> None:
        with budget.spend(pixels):
            with lock:
                inside[0] += min(pixels, 100)
                most[0] = max(most[0], inside[0])
            time.sleep(0.002)  # a budget that lets in too many has them meet here
            with lock:
                inside[0] -= min(pixels, 100)
        spent.append(pixels)

    threads = [threading.Thread(target=work, args=(30 + i % 3 * 40,), daemon=True) for i in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert len(spent) == 30
    assert most[0] <= 100
    assert budget._free == 100
    with budget.spend(1000):  # more than there is: all of it
        assert budget._free == 0
    with pytest.raises(RuntimeError), budget.spend(100):
        raise RuntimeError
    assert budget._free == 100  # what failed gave its pixels back, too
    together = threading.Barrier(2, timeout=30)

    def meet(pixels: int) -> None:
        with budget.spend(pixels):
            together.wait()

    threads = [threading.Thread(target=meet, args=(pixels,)) for pixels in (30, 70)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not together.broken  # two that fit together do not wait for each other


def test_processes_that_share_a_lock_file_decode_large_images_one_at_a_time(tmp_path: Path) -> None:
    """Each holds its own budget, as processes do; the lock is on the file."""
    large, small = 2**22 + 1, 1000
    inside, most, lock = [0], [0], threading.Lock()
    together = threading.Barrier(6, timeout=30)

    def work(pixels: int) -> None:
        budget = PixelBudget(2**26)
        budget.turns = tmp_path / "turns"
        with budget.spend(pixels):
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            if pixels == small:
                together.wait()  # all are inside at once
            time.sleep(0.02)  # large ones that do not take turns meet here
            with lock:
                inside[0] -= 1

    for pixels in (large, small):
        inside[0] = most[0] = 0
        threads = [threading.Thread(target=work, args=(pixels,)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert most[0] == (1 if pixels == large else 6)
        assert not together.broken
    assert (tmp_path / "turns").stat().st_mode & 0o777 == 0o600
