"""A disk that is full at any moment, and a run directory that cannot be written."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.training.crash_lives import (
    Lives,
    content,
    long_test,
    recorded,
    require_charged,
    require_noise_is_used_once,
    require_sound,
)

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("crashes")]  # one process that forks all lives

STEPS = 5
SEED = 7


@pytest.fixture(scope="module")
def whole(lives, tmp_path_factory) -> tuple[dict[str, bytes], int]:
    """Content of an uninterrupted run, and its number of file operations."""
    folder = tmp_path_factory.mktemp("whole")
    assert lives.live(folder / "run", seed=SEED, points=str(folder / "points"))
    return content(folder / "run"), (folder / "points").read_text().count("\n") + 1


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[..., Path]]:
    """Mounts a small disk of its own."""
    mounted: list[Path] = []

    def mount(size: str = "8m") -> Path:
        path = tmp_path / f"disk-{len(mounted)}"
        path.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"mounting a disk needs root: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", path], check=True)


# ------------------------------------------------------------------------------------------------- full


def full_at(lives: Lives, whole: tuple, folder: Path, points: range) -> int:
    """The disk is full from each of the points on; afterwards there is room again."""
    expected, _ = whole
    out, record = folder / "run", folder / "record"
    failures = 0
    for point in points:
        answer = lives.ask(out, seed=SEED, full_at=point, record=str(record))
        require_charged(out, recorded(record))
        if answer["code"] != 0:  # the last operations only remove checkpoints
            failures += 1
            assert "No space left" in answer["error"], (point, answer)
            # The message names a file that the user knows, and a start that failed leaves no key.
            assert "dpsyngen-tmp" not in answer["error"], (point, answer)
            assert (out / "run.json").exists() or not (out / "private" / "randomness.json").exists(), (point, answer)
        assert lives.live(out, seed=SEED, record=str(record))
        assert content(out) == expected, f"full at operation {point}"
        require_sound(out, STEPS)
        require_noise_is_used_once(recorded(record))
        shutil.rmtree(out)
        record.unlink()
    return failures


def test_full_at_some_operations(lives, whole, tmp_path) -> None:
    assert full_at(lives, whole, tmp_path, range(11, whole[1], 73)) >= 3


@long_test
def test_full_at_every_operation(lives, whole, tmp_path) -> None:
    failures = full_at(lives, whole, tmp_path, range(1, whole[1] + 1))
    print(f"\n{{'points': {whole[1]}, 'failures': {failures}}}")
    assert failures > 0.9 * whole[1]


def test_really_full_disk(lives, whole, disk) -> None:
    """A file system that is really full, at several sizes; room is made and the run goes on."""
    folder = disk("8m")
    expected, _ = whole
    total = sum(map(len, expected.values()))
    free = 8 * 2**20
    failed = 0
    for room in (0, 2_000, 30_000, total // 4, total // 2, total):
        (folder / "ballast").write_bytes(bytes(free - room - 8192))
        answer = lives.ask(folder / "run", seed=SEED, expected=True)
        failed += answer["code"] != 0
        if answer["code"] != 0:
            assert "No space left" in answer["error"], (room, answer)
        (folder / "ballast").unlink()
        assert lives.live(folder / "run", seed=SEED)
        assert content(folder / "run") == expected
        shutil.rmtree(folder / "run")
    assert failed >= 4


# -------------------------------------------------------------------------------------------- read-only


SMALL = [
    *("--network", "nano", "--public-steps", 2, "--steps", 4, "--batch", 12, "-k", 1, "--physical-batch", 8),
    *("--set", "public.batch=4", "--set", "sampling.steps=3", "--variant", "dpdm"),
]


def test_read_only_disk_is_one_line_and_nothing_is_begun(call, disk, tmp_path, tiny_images, lives) -> None:
    """Really read-only: as root, permissions would not stop anything."""
    images, labels = tiny_images()
    data = tmp_path / "d.npz"
    np.savez(data, images=images, labels=labels)
    folder = disk()
    finished, unfinished = folder / "finished", folder / "unfinished"
    assert call("train", "--data", data, "--epsilon", 8, "--out", finished, *SMALL)[0] == 0
    assert not lives.live(unfinished, seed=SEED, kill_at=200)
    (folder / "empty").mkdir()
    before = content(folder)
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    try:
        for arguments in (
            ("train", "--data", data, "--epsilon", 8, "--out", folder / "new", *SMALL),
            ("train", "--data", data, "--epsilon", 8, "--out", folder / "empty", *SMALL),
            ("train", "--resume", "--out", unfinished, "--data", data),
            ("evaluate", finished, "--data", data, "-n", 20, "--features", "pixels-pca"),
            ("report", finished),
        ):
            code, _, err = call(*arguments)
            assert code == 2, (arguments, err)
            assert "Read-only file system" in err
            lines = [line for line in err.splitlines() if line.startswith("dpsyngen: ")]
            assert len(lines) == 1, err
            assert re.search(r"Make it writable|choose another path", lines[0]), err
            assert "generating" not in err  # no work that would be for nothing
        # A finished run says that it is finished, writable or not.
        code, _, err = call("train", "--resume", "--out", finished, "--data", data)
        assert code == 2
        assert "finished already" in err
        assert content(folder) == before
        # Sampling writes nothing into the run.
        assert call("sample", finished, "-n", 2, "--out", tmp_path / "s")[0] == 0
    finally:
        subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
