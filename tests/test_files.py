"""Files are whole or not there, and only what a killed process left is ever cleared away."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from dpsyngen import files
from dpsyngen.data import load_images
from dpsyngen.errors import DataError, RunError
from dpsyngen.files import (
    NotPlainError,
    is_temporary,
    memory_bytes,
    open_plain,
    remove_temporaries,
    require_absent_or_empty,
    write_atomically,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_memory_is_that_of_the_container_and_pages_of_files_give_way(monkeypatch) -> None:
    machine = {"/proc/meminfo": "MemTotal: 8000 kB\nMemFree: 100 kB\nMemAvailable:    6000 kB\n"}
    group = {f"/sys/fs/cgroup/memory.{name}": said for name, said in {"current": "3000000\n", "max": "max\n"}.items()}
    group["/sys/fs/cgroup/memory.stat"] = "anon 1000000\nfile 2000000\n"

    def read_text(path: Path, **_: str) -> str:
        try:
            return machine[str(path)]
        except KeyError:
            raise FileNotFoundError from None

    monkeypatch.setattr(Path, "read_text", read_text)
    assert memory_bytes() == (8_192_000, 6_144_000)
    machine |= group
    assert memory_bytes() == (8_192_000, 6_144_000)
    machine["/sys/fs/cgroup/memory.max"] = "4000000\n"
    assert memory_bytes() == (4_000_000, 3_000_000)
    machine["/sys/fs/cgroup/memory.max"] = "9000000000\n"
    assert memory_bytes() == (8_192_000, 6_144_000)


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_content_and_mode(tmp_path, mode) -> None:
    path = tmp_path / "ε"
    for text in ("old", "neu ε\n"):
        write_text(path, text, mode)
        assert path.read_text(encoding="utf-8") == text
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert names(tmp_path) == ["ε"]


def test_private_content_is_never_readable_by_others(tmp_path) -> None:
    """Not even while it is being written."""

    def write(temporary: Path) -> None:
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
        temporary.write_text("x")

    write_atomically(tmp_path / "f", write, 0o644)


@pytest.mark.parametrize("fault", ["write", "os.chmod", "os.fsync", "os.replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failure_anywhere_leaves_what_was_there(tmp_path, monkeypatch, fault, error) -> None:
    path = tmp_path / "f"
    write_text(path, "old")

    def fail(*_: object) -> None:
        raise error

    if fault != "write":
        monkeypatch.setattr(os, fault.removeprefix("os."), fail)
    with pytest.raises(type(error)) as caught:
        write_atomically(path, fail if fault == "write" else lambda p: p.write_text("new"))
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["f"]
    if isinstance(error, OSError):
        # The user knows this name, not that of the temporary file.
        assert caught.value.filename == str(path)
        assert caught.value.errno == errno.ENOSPC


def test_content_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(fd: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        fsync(fd)

    def spy_replace(a: Path, b: Path) -> None:
        order.append("rename")
        replace(a, b)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    write_text(tmp_path / "f", "x")
    assert order == ["file", "rename", "folder"]


def test_temporary_names_are_recognised_and_others_are_not(tmp_path, monkeypatch) -> None:
    """What a kill leaves is found whatever the name of the file was; nothing that a person would write is."""
    for name in ("f", "a.b.c", "ü" * 120, "x" * 255):
        seen: list[str] = []
        write_atomically(tmp_path / name, lambda p, seen=seen: seen.append(p.name))
        assert is_temporary(seen[0]), seen
    for name in ("f", ".f", ".f.tmp", ".f.abcdefgh", "f.abcdefgh.dpsyngen-tmp", ".f.ABCDEFGH.dpsyngen-tmp"):
        assert not is_temporary(name)
    assert not is_temporary("..dpsyngen-tmp")
    assert not is_temporary(".f.abc.dpsyngen-tmp")


def test_only_left_over_temporaries_are_removed(tmp_path) -> None:
    left = ".generator.json.k3j_5h8a.dpsyngen-tmp"
    for name in (left, ".hidden", "notes.txt", ".generator.json.k3j_5h8a", "x.dpsyngen-tmp"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".folder.abcdefgh.dpsyngen-tmp").mkdir()
    (tmp_path / ".link.abcdefgh.dpsyngen-tmp").symlink_to(tmp_path / "notes.txt")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / left).write_text("x")
    before = names(tmp_path)
    remove_temporaries(tmp_path)
    assert names(tmp_path) == [n for n in before if n != left]
    assert (tmp_path / "sub" / left).exists()


def test_a_killed_process_leaves_a_name_that_is_cleared_away(tmp_path) -> None:
    pid = os.fork()
    if pid == 0:
        write_atomically(tmp_path / "f", lambda p: os.kill(os.getpid(), 9))
        os._exit(0)
    os.waitpid(pid, 0)
    assert len(names(tmp_path)) == 1
    assert is_temporary(names(tmp_path)[0])
    remove_temporaries(tmp_path)
    assert names(tmp_path) == []


def test_existing_things_are_refused(tmp_path) -> None:
    require_absent_or_empty(tmp_path / "new", "--out")
    require_absent_or_empty(tmp_path, "--out")
    (tmp_path / "f").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path, tmp_path / "f", tmp_path / "dangling"):
        with pytest.raises(RunError, match="exists already"):
            require_absent_or_empty(path, "--out")
    with pytest.raises(RunError, match="f is not a folder"):  # rather than an error of the system, after the work
        require_absent_or_empty(tmp_path / "f" / "new" / "out", "--out")


def test_missing_folder_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        write_text(tmp_path / "gone" / "f", "x")
    assert caught.value.filename == str(tmp_path / "gone" / "f")
    assert files.TEMPORARY_SUFFIX not in str(caught.value)


def test_open_plain(tmp_path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    os.mkfifo(tmp_path / "pipe")
    with open_plain(tmp_path / "a", 5) as file:
        assert file.read() == b"12345"
    for name, limit, why in (
        ("a", 4, "over the limit"),
        ("link", 5, "symbolic link"),
        ("pipe", 5, "not a plain file"),
        (".", 5, "not a plain file"),
        ("missing", 5, "No such file"),
        ("a\0", 5, "cannot be a path"),
    ):
        with pytest.raises(NotPlainError, match=why):
            open_plain(tmp_path / name, limit)


def test_a_file_that_is_missing_is_not_called_damaged(tmp_path) -> None:
    with pytest.raises(DataError, match=r"none.csv cannot be read as a table: cannot be opened \(No such file"):  # noqa: SIM117
        with files.damaged(tmp_path / "none.csv", "a table"):
            open_plain(tmp_path / "none.csv", 5)
    with pytest.raises(DataError, match="is not a table, or is damaged"), files.damaged("a.csv", "a table"):
        raise ValueError


def test_without_a_home_there_is_a_cache_of_this_user_alone(tmp_path, monkeypatch) -> None:
    def nobody(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nobody)
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert files.expanded("~/x") == Path("~/x")
    cache = files.cache_home()
    assert cache.parent == tmp_path
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert files.cache_home() == cache
    cache.chmod(0o777)  # somebody else may have made it
    assert files.cache_home() != cache


def test_what_a_fresh_disk_has_counts_as_empty(tmp_path) -> None:
    (tmp_path / "lost+found").mkdir()
    files.require_absent_or_empty(tmp_path, "--out")


@pytest.mark.parametrize("existing", [False, True])
def test_a_new_folder_appears_whole_beside_its_place_or_in_it(tmp_path, existing) -> None:
    """A folder that is there may be a mounted disk, which cannot be renamed onto."""
    target = tmp_path / "out"
    if existing:
        target.mkdir(mode=0o750)
        (target / "lost+found").mkdir()
        inode = target.stat().st_ino
    for fails in (True, False):
        try:
            with files.new_folder(target) as folder:
                (folder / "a").mkdir()
                (folder / "a" / "x").write_text("1")
                (folder / "y").write_text("2")
                files.require_absent_or_empty(target, "--out")
                if fails:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            assert not target.exists() or [p.name for p in target.iterdir()] == ["lost+found"]
    assert {p.name for p in target.iterdir()} - {"lost+found"} == {"a", "y"}
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    assert not existing or (target.stat().st_ino, stat.S_IMODE(target.stat().st_mode)) == (inode, 0o750)


@pytest.mark.parametrize("existing", [False, True])
def test_a_new_folder_that_another_process_writes_is_refused_and_left_alone(tmp_path, existing) -> None:
    target = tmp_path / "out"
    if existing:
        target.mkdir()
    with files.new_folder(target) as folder:
        (folder / "a").write_text("a")
        with pytest.raises(RunError, match="another process is writing to"), files.new_folder(target):
            pass
        (folder / "b").write_text("b")
    assert {p.name for p in target.iterdir()} == {"a", "b"}
    with pytest.raises(RunError, match="not an empty folder"), files.new_folder(target):
        pass
    assert {p.name for p in tmp_path.rglob("*")} == {"out", "a", "b"}


@pytest.mark.parametrize("moved", [0, 1])
def test_what_a_kill_leaves_in_a_folder_is_written_anew_or_refused(tmp_path, moved) -> None:
    pid = os.fork()
    if pid == 0:
        with files.new_folder(tmp_path) as folder:
            for name in "ab":
                (folder / name).write_text(name)
            real, calls = Path.rename, []

            def rename(*names):
                calls.append(names)
                return real(*names) if len(calls) <= moved else os.kill(os.getpid(), 9)

            Path.rename = rename
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == 9
    with pytest.raises(DataError, match="part of the images only"):
        load_images(tmp_path)
    if moved:
        with pytest.raises(RunError, match="part of what an interrupted command wrote"):
            files.require_absent_or_empty(tmp_path, "--out")
        return
    files.require_absent_or_empty(tmp_path, "--out")
    with files.new_folder(tmp_path) as folder:
        (folder / "c").write_text("c")
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_file_that_is_mounted_by_itself_is_told_of(tmp_path, monkeypatch) -> None:
    def busy(*names: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(os, "replace", busy)
    with pytest.raises(OSError, match="mount the folder that holds it"):
        files.write_text(tmp_path / "budget.json", "{}")
