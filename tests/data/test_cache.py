"""Decoded images in a file: private, made once, whole or not at all."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpsyngen.config import load_config
from dpsyngen.data import cache, load_images, source
from dpsyngen.data.cache import Cache
from dpsyngen.data.store import SelectedImages, StoredImages
from dpsyngen.errors import ConfigError, DataError
from tests.data.encoded import pixels, png, samples, write_tar

COUNT = 150


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "s.tar", samples(pixels(COUNT), [i % 3 for i in range(COUNT)]))


def entries(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir())


class _Counted:
    """Counts the images that are decoded, and stops after some."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int = 10**9) -> None:
        self.count, self.most = 0, most
        whole = source.read_image

        def counted(item, **how):
            if self.count >= self.most:
                raise KeyboardInterrupt
            self.count += 1
            return whole(item, **how)

        monkeypatch.setattr(source, "read_image", counted)


def test_what_is_in_the_file_is_what_is_in_memory_otherwise(tar: Path, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "cache"
    memory = load_images(tar)
    decoded = _Counted(monkeypatch)
    first = load_images(tar, cache=folder, workers=1)
    assert decoded.count == COUNT
    again = load_images(tar, cache=str(folder))
    assert decoded.count == COUNT
    for data in (first, again):
        assert isinstance(data.images, StoredImages)
        assert data.fingerprint() == memory.fingerprint()
    assert load_images(tar, cache=folder, resolution=8).resolution == 8
    assert decoded.count == 2 * COUNT


def test_it_is_for_its_owner_alone(tar: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "cache"
    before = os.umask(0)
    try:
        load_images(tar, cache=folder)
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    for path in folder.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
    entry = entries(folder)[0]
    assert sorted(p.name for p in entry.iterdir()) == ["about.json", "images.npy", "labels.npy"]
    assert np.array_equal(np.load(entry / "images.npy")[:, 0], pixels(COUNT))
    os.chmod(entry, 0o750)
    with pytest.raises(DataError, match="only you can read"):
        load_images(tar, cache=folder)


def test_large_sets_go_to_a_file_by_themselves(tar: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("DPSYNGEN_CACHE", str(tmp_path / "own"))
    assert isinstance(load_images(tar).images, np.ndarray)
    assert not (tmp_path / "own").exists()
    monkeypatch.setattr(cache, "IN_MEMORY_BYTES", COUNT * 256)
    assert isinstance(load_images(tar).images, np.ndarray)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # two processes on this machine share the memory
    assert isinstance(load_images(tar).images, StoredImages)
    assert len(entries(tmp_path / "own")) == 1


def test_where_it_lies_by_default(monkeypatch, tmp_path: Path) -> None:
    for name in ("DPSYNGEN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Cache().folder == tmp_path / ".cache" / "dpsyngen" / "images"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert Cache().folder == tmp_path / "x" / "dpsyngen" / "images"
    monkeypatch.setenv("DPSYNGEN_CACHE", "~/own")
    assert Cache().folder == tmp_path / "own"


def test_a_source_that_changed_is_read_again(tar: Path, tmp_path: Path) -> None:
    old = load_images(tar, cache=tmp_path / "cache")
    write_tar(tar, samples(pixels(COUNT, seed=1), [0] * COUNT))
    assert load_images(tar, cache=tmp_path / "cache").fingerprint() == load_images(tar).fingerprint()
    assert len(entries(tmp_path / "cache")) == 1  # redacted images do not stay on the disk
    assert np.array_equal(old.batch([3])[:, 0], pixels(COUNT)[[3]])


@pytest.mark.parametrize("kind", ["folder", "tar", "npy"])
def test_redaction_is_seen_whatever_sizes_and_times_say(kind: str, tmp_path: Path, monkeypatch) -> None:
    """As on FAT and some network disks, which keep no time that a copying tool could not set back."""
    source = {"folder": tmp_path / "folder", "tar": tmp_path / "a.tar", "npy": tmp_path / "a.npy"}[kind]

    def write(images: np.ndarray) -> None:
        if kind == "folder":
            source.mkdir(exist_ok=True)
            for i, image in enumerate(images):
                Image.fromarray(image).save(source / f"{i}.bmp")
        elif kind == "tar":
            write_tar(source, [(f"{i}.bmp", bmp(image)) for i, image in enumerate(images)])
        else:
            np.save(source, images.astype(np.float32) / 255)

    def bmp(image: np.ndarray) -> bytes:
        Image.fromarray(image).save(content := io.BytesIO(), "bmp")
        return content.getvalue()

    write(pixels(COUNT))
    load_images(source, cache=tmp_path / "cache")
    files = sorted(source.iterdir()) if kind == "folder" else [source]
    before = {str(file): file.stat() for file in files}
    write(255 - pixels(COUNT))
    assert all(file.stat().st_size == before[str(file)].st_size for file in files)
    true = os.stat
    for name in ("stat", "lstat"):
        monkeypatch.setattr(os, name, lambda path, *a, **b: before.get(str(path)) or true(path, *a, **b))
    again = load_images(source, cache=tmp_path / "cache")
    assert np.array_equal(np.sort(again.array().mean((1, 2, 3))), np.sort((255 - pixels(COUNT)).mean((1, 2))))


def test_a_source_that_changes_meanwhile_is_refused(tar: Path, tmp_path: Path) -> None:
    def change(done: int, total: int) -> None:
        with open(tar, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\1")

    with pytest.raises(DataError, match="changed while it was read"):
        load_images(tar, cache=tmp_path / "cache", workers=1, on_progress=change)
    assert entries(tmp_path / "cache") == []


@pytest.mark.parametrize("persons", [False, True])
def test_an_image_that_comes_before_the_digest_is_in_the_index_too(
    persons: bool, class_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    """Hours may lie between an index and the digest that it is filed under, for headers are read and a lock awaited."""
    table = tmp_path / "persons.csv"
    names = [f"{kind}/{i}.png" for kind in ("cats", "dogs") for i in range(3)] + ["cats/00.png"]
    table.write_text("file_name,person\n" + "".join(f"{name},{i}\n" for i, name in enumerate(names)))
    monkeypatch.setattr(cache, "IN_MEMORY_BYTES", 0)
    monkeypatch.setenv("DPSYNGEN_CACHE", str(tmp_path / "cache"))
    waited = Cache.locked

    def locked(self: Cache, name: str):
        (class_folder / "cats" / "00.png").write_bytes(png(pixels(1, seed=5)[0]))
        return waited(self, name)

    monkeypatch.setattr(Cache, "locked", locked)
    data = load_images(class_folder, groups=table if persons else None)
    assert len(data) == len(load_images(class_folder)) == 7
    assert (data.persons is not None) == persons


def test_what_was_touched_is_not_decoded_again(tar: Path, tmp_path: Path, monkeypatch) -> None:
    load_images(tar, cache=tmp_path / "cache")
    os.utime(tar, (1, 1))
    decoded = _Counted(monkeypatch)
    load_images(tar, cache=tmp_path / "cache")
    assert decoded.count == 0


def test_names_of_files_are_content(tmp_path: Path) -> None:
    for i, image in enumerate(pixels(4)):
        (tmp_path / "x" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "x" / "ab"[i % 2] / f"{i}.png")
    before = load_images(tmp_path / "x", cache=tmp_path / "cache")
    (tmp_path / "x" / "a" / "0.png").rename(tmp_path / "x" / "b" / "0.png")
    assert (before.labels.sum(), load_images(tmp_path / "x", cache=tmp_path / "cache").labels.sum()) == (2, 3)


def test_labels_in_a_table_are_content(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    table, labels = tmp_path / "labels.csv", []
    for i, image in enumerate(pixels(4)):
        Image.fromarray(image).save(tmp_path / "x" / f"{i}.png")
    for last in "ab":
        table.write_text(f"file_name,label\n0.png,a\n1.png,b\n2.png,b\n3.png,{last}\n")
        labels.append(load_images(tmp_path / "x", labels=table, cache=tmp_path / "cache").labels.sum())
    assert labels == [2, 3]


def test_an_interrupted_decoding_leaves_nothing_and_starts_again(tar: Path, tmp_path: Path, monkeypatch) -> None:
    memory = load_images(tar)
    folder = tmp_path / "cache"
    with monkeypatch.context() as patch:
        stopped = _Counted(patch, 70)
        with pytest.raises(KeyboardInterrupt):
            load_images(tar, cache=folder, workers=1)
    assert 0 < stopped.count <= 70
    assert entries(folder) == []
    assert load_images(tar, cache=folder, workers=1).fingerprint() == memory.fingerprint()


def test_what_a_killed_process_left_is_removed_with_a_word_and_never_used(tar: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    kill = "import os, sys; from dpsyngen.data import load_images as load; load(sys.argv[1], cache=sys.argv[2], "
    kill += "workers=1, on_progress=lambda done, total: os.kill(os.getpid(), 9))"
    assert subprocess.run([sys.executable, "-c", kill, tar, folder]).returncode == -9
    (part,) = entries(folder)
    assert part.suffix == ".part"
    assert part.stat().st_mode & 0o077 == 0
    with pytest.warns(UserWarning, match="starts again"):
        data = load_images(tar, cache=folder)
    assert data.fingerprint() == load_images(tar).fingerprint()
    assert [p.suffix for p in entries(folder)] == [""]


def test_too_little_room_is_told_before_anything_is_decoded(tar: Path, tmp_path: Path, monkeypatch) -> None:
    import shutil

    decoded = _Counted(monkeypatch)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DataError, match=r"need 0\.02 GiB(.|\n)*0\.00 GiB are free(.|\n)*data\.cache=PATH"):
        load_images(tar, cache=tmp_path / "cache")
    assert decoded.count == 0
    assert not list((tmp_path / "cache").rglob("images.npy"))


def test_room_that_the_disk_refuses_is_told_before_anything_is_decoded(tar: Path, tmp_path: Path, monkeypatch) -> None:
    decoded = _Counted(monkeypatch)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "posix_fallocate", full)
    with pytest.raises(DataError, match="are free"):
        load_images(tar, cache=tmp_path / "cache")
    assert decoded.count == 0


def test_a_folder_that_cannot_be_used(tar: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        DataError, match=r"^the decoded images go to a file(.|\n)*cannot be used(.|\n)*data\.cache=PATH"
    ):
        load_images(tar, cache=tmp_path / "file")
    for wrong in ("", " ", 3, "a\0b"):
        with pytest.raises(ConfigError, match="cache is"):
            load_images(tar, cache=wrong)
    for wrong in (0, -1, 2000, True, 1.5):
        with pytest.raises(ConfigError, match="workers is"):
            load_images(tar, workers=wrong)


def test_a_cache_among_the_images_is_refused(class_folder: Path) -> None:
    for place in (class_folder, class_folder / "cache"):
        with pytest.raises(ConfigError, match="a folder outside that of the images"):
            load_images(class_folder, cache=place)
    assert isinstance(load_images(class_folder, cache=class_folder / ".cache").images, StoredImages)


@pytest.mark.parametrize("variable", ["DPSYNGEN_CACHE", "XDG_CACHE_HOME"])
def test_so_is_one_that_the_environment_puts_there(variable: str, class_folder: Path, monkeypatch) -> None:
    """In a flat folder it would turn the images into no class of two, and its digest into that of nothing."""
    monkeypatch.delenv("DPSYNGEN_CACHE", raising=False)
    monkeypatch.setenv(variable, str(class_folder / "cats" / "cache"))
    monkeypatch.setattr(cache, "IN_MEMORY_BYTES", 0)
    with pytest.raises(ConfigError, match="a folder outside that of the images"):
        load_images(class_folder / "cats")
    assert not (class_folder / "cats" / "cache").exists()


def test_damaged_entries_are_named(tar: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    load_images(tar, cache=folder)
    entry = entries(folder)[0]
    for name in ("images.npy", "labels.npy", "about.json"):
        content = (entry / name).read_bytes()
        for left in (0, len(content) // 2):
            (entry / name).write_bytes(content[:left])
            with pytest.raises(DataError, match=r"damaged(.|\n)*Remove it"):
                load_images(tar, cache=folder)
        (entry / name).write_bytes(content)
    assert len(load_images(tar, cache=folder)) == COUNT


def test_bad_images_are_left_out_of_the_file(tmp_path: Path) -> None:
    content = samples(pixels(COUNT), [i % 3 for i in range(COUNT)])
    for i in (0, 7, 77, COUNT - 1):
        content[2 * i] = (content[2 * i][0], b"broken")
    path = write_tar(tmp_path / "s.tar", content)
    folder = tmp_path / "cache"
    with pytest.raises(DataError, match="4 items"):
        load_images(path, cache=folder)
    memory = load_images(path, skip_bad=True)
    data = load_images(path, cache=folder, skip_bad=True)
    assert (len(data), data.fingerprint(), data.skipped) == (COUNT - 4, memory.fingerprint(), memory.skipped)
    assert isinstance(data.images, SelectedImages)
    assert data.file is not None
    # They are still bad when the file is there.
    with pytest.raises(DataError, match="4 items"):
        load_images(path, cache=folder)
    assert load_images(path, cache=folder, skip_bad=True).skipped == memory.skipped


def test_folders_of_images_are_cached_too(class_folder: Path, tmp_path: Path, monkeypatch) -> None:
    memory = load_images(class_folder)
    first = load_images(class_folder, cache=tmp_path / "cache")
    decoded = _Counted(monkeypatch)
    again = load_images(class_folder, cache=tmp_path / "cache")
    assert first.fingerprint() == again.fingerprint() == memory.fingerprint()
    assert decoded.count == 0
    (class_folder / "cats" / "0.png").write_bytes(png(pixels(1, seed=5)[0]))
    assert load_images(class_folder, cache=tmp_path / "cache").fingerprint() != memory.fingerprint()


# ------------------------------------------------------------------------------------------- several processes

_LOAD = """
import sys, time
from dpsyngen.data import load_images
data = load_images(sys.argv[1], cache=sys.argv[2], workers=2, on_progress=lambda done, total: print("decodes"))
print(data.fingerprint())
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough images for decoding in processes; a script without a main guard reads them, three at the same time."""
    folder = tmp_path_factory.mktemp("many")
    count = cache._FEW + 100
    write_tar(folder / "s.tar", samples(pixels(count, 8), [i % 3 for i in range(count)]))
    (folder / "script.py").write_text(_LOAD)
    started = [
        subprocess.Popen(
            [sys.executable, folder / "script.py", folder / "s.tar", folder / "cache"],
            stdout=open(folder / f"out-{i}", "w"),  # noqa: SIM115
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        for i in range(3)
    ]
    assert [process.wait(timeout=100) for process in started] == [0, 0, 0]
    return folder


@pytest.mark.slow
def test_one_process_decodes_and_the_others_wait(many: Path) -> None:
    lines = [(many / f"out-{i}").read_text().split() for i in range(3)]
    expected = load_images(many / "s.tar").fingerprint()
    assert [out[-1] for out in lines] == [expected] * 3
    assert sorted(len(out) > 1 for out in lines) == [False, False, True]
    assert len(entries(many / "cache")) == 1


def _dies(job: object) -> None:
    os.kill(os.getpid(), 9)


def _fails(job: object) -> None:
    raise DataError("this file")


@pytest.mark.parametrize(("task", "why"), [(_dies, "ended from outside(.|\n)*data.workers=1"), (_fails, "this file")])
def test_decoders_that_end_or_fail_are_an_error(task, why: str) -> None:
    with pytest.raises(DataError, match=why):
        list(cache._by_processes(task, ["a job", "another"], 2))


# ------------------------------------------------------------------------------------------------------ settings


def test_where_the_cache_lies_is_not_released_and_may_change(tmp_path: Path) -> None:
    from dpsyngen.release.write import public_config

    settings = {"data": {"cache": str(tmp_path / "secret-place"), "workers": 3, "source": "x"}}
    config = load_config(settings, preset="cpu-small")
    assert "secret-place" not in json.dumps(public_config(config))
    from dpsyngen.training.session import fixed_settings

    assert not {"data.cache", "data.workers"} & set(fixed_settings(config))


def test_the_settings_reach_the_reader(tar: Path, tmp_path: Path) -> None:
    from dpsyngen.data.load import load_private

    settings = {"data": {"cache": str(tmp_path / "c"), "workers": 1, "resolution": 8}}
    data = load_private(tar, load_config(settings, preset="cpu-small"))
    assert isinstance(data.images, StoredImages)
    assert data.images.path.is_relative_to(tmp_path / "c")
