"""One process at a time, a run directory that is whole or can be started again, and signals."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpsyngen.config import load_config
from dpsyngen.distributed import ALONE
from dpsyngen.errors import RunError
from dpsyngen.training import run as run_module
from dpsyngen.training.run import FolderLock, Run

pytestmark = pytest.mark.slow

CONFIG = load_config({"privacy": {"epsilon": 1}})


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def python(code: str, *arguments: object) -> subprocess.Popen:
    """Another process; nothing heavy is imported."""
    head = """
        import sys, os
        from pathlib import Path
        from dpsyngen.config import load_config
        from dpsyngen.errors import RunError
        from dpsyngen.training.run import Run
        out = Path(sys.argv[1])
        """
    text = textwrap.dedent(head) + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-c", text, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[2],
    )


HOLD = """
    run = Run(out)
    run.open_for_writing()
    print("held", flush=True)
    sys.stdin.read()
    """


# --------------------------------------------------------------------------------------------------- lock


def test_another_process_is_refused_until_this_one_ends_even_by_a_kill(tmp_path) -> None:
    Run.create(tmp_path / "r", CONFIG)
    other = python(HOLD, tmp_path / "r")
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    for take in (Run(tmp_path / "r").open_for_writing, lambda: Run(tmp_path / "r").lock().__enter__()):
        with pytest.raises(RunError, match="another process is working"):
            take()
    os.kill(other.pid, signal.SIGKILL)
    other.wait(30)
    # The lock file is still there; a lock of a dead process is none.
    assert (tmp_path / "r" / "private" / "lock").exists()
    Run(tmp_path / "r").open_for_writing()
    other.communicate()


def test_a_child_does_not_keep_the_lock_of_a_dead_parent(tmp_path) -> None:
    """As a worker process would that survives the kill of its parent."""
    Run.create(tmp_path / "r", CONFIG)
    code = """
        run = Run(out)
        run.open_for_writing()
        if os.fork() == 0:
            print("child", os.getpid(), flush=True)
            sys.stdin.read()
            os._exit(0)
        os.kill(os.getpid(), 9)
        """
    parent = python(code, tmp_path / "r")
    assert parent.stdout is not None
    assert parent.stdin is not None
    _, pid = parent.stdout.readline().split()
    parent.wait(30)
    assert parent.returncode == -signal.SIGKILL
    os.kill(int(pid), 0)  # alive
    Run(tmp_path / "r").open_for_writing()
    parent.stdin.close()
    parent.stdout.read()


def test_run_that_is_made_is_locked_from_its_first_moment(tmp_path) -> None:
    run = Run.create(tmp_path / "r", CONFIG)
    code = """
        try: Run(out).open_for_writing()
        except RunError as error: print(error)
        """
    assert "another process" in python(code, tmp_path / "r").communicate()[0]
    with run.lock():
        pass
    assert python(code, tmp_path / "r").communicate()[0] == ""


def test_within_a_process_only_one_object_holds_it(tmp_path) -> None:
    first = Run.create(tmp_path / "r", CONFIG)
    second = Run(tmp_path / "r")
    with first.lock(), first.lock(), pytest.raises(RunError, match="another process"):
        second.open_for_writing()
    with second.lock():
        code = "try: Run(out).open_for_writing()\nexcept RunError: print('refused')"
        assert python(code, tmp_path / "r").communicate()[0] == "refused\n"
    first.open_for_writing()


def test_lock_goes_with_its_object(tmp_path) -> None:
    run = Run.create(tmp_path / "r", CONFIG)
    path = run.private / "lock"
    del run
    with open(path) as f:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EWOULDBLOCK, "another process is working"),
        (errno.ENOLCK, "file system has no locks"),
        (errno.ENOTSUP, "file system has no locks"),
    ],
)
def test_file_systems_without_locks_are_not_called_busy(tmp_path, monkeypatch, number, message) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(RunError, match=message):
        FolderLock(tmp_path / "lock", tmp_path).acquire()


def test_temporaries_go_when_the_run_is_opened_for_writing_and_nothing_else_does(tmp_path) -> None:
    run = Run.create(tmp_path / "r", CONFIG)
    run.release.joinpath("mine.txt").write_text("x")
    left = [
        run.path / ".run.json.abcdefgh.dpsyngen-tmp",
        run.private / ".checkpoint.safetensors.a_cdefg1.dpsyngen-tmp",
        run.release / ".generator.json.abcdefgh.dpsyngen-tmp",
        run.release / "weights" / ".context.safetensors.abcdefgh.dpsyngen-tmp",
    ]
    with run.lock():
        pass
    for path in left:
        path.write_text("x")
    before = set(run.path.rglob("*"))
    Run(run.path)
    assert set(run.path.rglob("*")) == before  # opened for reading
    with Run(run.path).lock():
        assert set(run.path.rglob("*")) == before - set(left)


# -------------------------------------------------------------------------------------------- new folders


def killed_at(path: Path, operation: str, monkeypatch) -> None:
    """What a kill leaves just before an operation of the making of a run directory, in a process of its own."""
    pid = os.fork()
    if pid == 0:

        def kill(*_: object, **__: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        where = {"lock": (run_module.FolderLock, "acquire"), "config": (run_module, "write_text")}
        where |= {"stamp": (run_module.json, "dumps"), "rename": (os, "replace")}
        monkeypatch.setattr(*where[operation], kill)
        Run.create(path, CONFIG)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


OPERATIONS = ["lock", "config", "stamp", "rename"]


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_interrupted_start_is_no_run_and_is_started_again(tmp_path, monkeypatch, operation, existing) -> None:
    path = tmp_path / "a" / "r"
    if existing:
        path.mkdir(parents=True, mode=0o750)
        (path / "lost+found").mkdir()
    killed_at(path, operation, monkeypatch)
    with pytest.raises(RunError, match="not a run"):
        Run(path)
    Run.create(path, CONFIG)
    assert names(path.parent) == {"r"}
    assert names(path) - {"lost+found"} == {"private", "release", "run.json"}
    assert names(path / "private") == {"lock", "config.yaml"}
    assert names(path / "release") == {"weights"}
    assert not names(path / "release" / "weights")
    assert (path / "private").stat().st_mode & 0o777 == 0o700
    assert not existing or path.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("foreign", ["notes.txt", "private/randomness.json", "release/weights/w", "release/x.json"])
def test_what_somebody_put_into_an_interrupted_start_stays(tmp_path, monkeypatch, foreign) -> None:
    """Of a run that lost its run.json, too: its key and ledger are no leftovers."""
    path = tmp_path / "r"
    killed_at(path, "stamp", monkeypatch)
    (path / foreign).write_text("precious")
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    with pytest.raises(RunError, match="exists already and is not an empty folder"):
        Run.create(path, CONFIG)
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("how", ["open", "link"])
def test_a_private_half_that_others_may_have_made_is_refused(tmp_path, how) -> None:
    path = tmp_path / "r"
    path.mkdir()
    if how == "open":
        (path / "private").mkdir()
        (path / "private").chmod(0o777)
    else:
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        (path / "private").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="not an empty folder"):
        Run.create(path, CONFIG)


def test_an_interrupted_start_of_a_living_process_is_not_taken_over(tmp_path) -> None:
    path = tmp_path / "r"
    code = """
        import dpsyngen.training.run as module
        real = module.write_text
        def write_text(path, *more):
            print("writing", path, flush=True)
            sys.stdin.readline()
            return real(path, *more)
        module.write_text = write_text
        Run.create(out, load_config({"privacy": {"epsilon": 1}}))
        print("made")
        """
    other = python(code, path)
    assert other.stdout is not None
    assert other.stdout.readline().startswith("writing")
    with pytest.raises(RunError, match="another process is working"):
        Run.create(path, CONFIG)
    assert "made" in other.communicate("\n\n")[0]
    with pytest.raises(RunError, match=r"unfinished run.*--resume"):
        Run.create(path, CONFIG)


def test_of_two_that_start_at_once_one_makes_the_run(tmp_path) -> None:
    code = """
        config = load_config({"privacy": {"epsilon": 1}})
        print("ready", flush=True)
        sys.stdin.readline()
        for number in range(40):
            try:
                run = Run.create(out / str(number), config)
                print("made", number, flush=True)
            except RunError as error:
                print("refused", number, error, flush=True)
        """
    both = [python(code, tmp_path) for _ in range(2)]
    for p in both:
        assert p.stdout is not None
        assert p.stdout.readline() == "ready\n"
    for p in both:
        assert p.stdin is not None
        p.stdin.write("\n")
        p.stdin.flush()
    lines = [line.split(maxsplit=2) for p in both for line in p.communicate()[0].splitlines()]
    assert len(lines) == 80, lines
    for number in range(40):
        outcome = sorted(word for word, n, *_ in lines if n == str(number))
        assert outcome in (["made", "refused"], ["refused", "refused"]), lines
        if "made" in outcome:
            assert names(tmp_path / str(number)) == {"private", "release", "run.json"}
            assert Run(tmp_path / str(number)).config == CONFIG


@pytest.mark.parametrize("fault", ["mkdir", "write_text"])
def test_a_start_that_fails_is_started_again(tmp_path, monkeypatch, fault) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr({"mkdir": Path, "write_text": run_module}[fault], fault, fail)
        with pytest.raises(RunError, match=r"cannot be made: No space left on device.*start again"):
            Run.create(tmp_path / "r", CONFIG)
    Run.create(tmp_path / "r", CONFIG)


def test_a_run_can_be_made_in_the_current_folder_and_on_a_mounted_disk(tmp_path, monkeypatch) -> None:
    path = tmp_path / "volume"
    path.mkdir()
    monkeypatch.chdir(path)
    Run.create(Path("."), CONFIG)
    assert Run(path).config == CONFIG
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path / "disk"]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting needs root: {mounted.stderr.strip()}")
    try:
        Run.create(tmp_path / "disk", CONFIG)
        assert names(tmp_path) == {"volume", "disk"}
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)


# ------------------------------------------------------------------------------------------------ signals


@pytest.fixture
def training():
    return SimpleNamespace(stop_requested=False, ranks=ALONE)


@pytest.fixture
def hang_up() -> Iterator[None]:
    """A closed terminal is noticed, even if the tests themselves were started by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hang_up")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_first_signal_asks_and_second_ends(training, number) -> None:
    from dpsyngen.training.follower import stop_on_signals

    before = signal.getsignal(number)
    said: list[str] = []
    with stop_on_signals(training, said.append):
        os.kill(os.getpid(), number)
        assert training.stop_requested
        assert len(said) == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_nohup_stays_in_force(training) -> None:
    from dpsyngen.training.follower import stop_on_signals

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals(training, lambda line: None):
            os.kill(os.getpid(), signal.SIGHUP)
            assert not training.stop_requested
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hang_up")
def test_closed_terminal_ends_training_with_a_checkpoint(tmp_path, tiny_images) -> None:
    """A real pseudo-terminal that goes away: what is written to it fails, and training must not mind."""
    import pty

    import numpy as np

    images, labels = tiny_images()
    np.savez(tmp_path / "d.npz", images=images, labels=labels)
    out = tmp_path / "r"
    command = [
        *(sys.executable, "-m", "dpsyngen", "train", "--data", tmp_path / "d.npz", "--epsilon", "inf", "--out", out),
        *("--network", "nano", "--variant", "dpdm", "--steps", "3000", "--batch", "12", "-k", "1"),
        *("--physical-batch", "8", "--set", "private.checkpoint_every=1000"),
    ]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(Path(__file__).parents[2])
        os.execve(sys.executable, [str(c) for c in command], os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm"})
    log = out / "private" / "training.jsonl"
    seen = b""
    while not (log.exists() and log.read_text().count("\n") >= 3):
        try:
            seen += os.read(terminal, 1000)
        except OSError:
            break
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), seen.decode()
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.WIFEXITED(status), status
    assert os.WEXITSTATUS(status) == 130, seen.decode()
    assert (out / "private" / "checkpoint.safetensors").exists()
    done = log.read_text().count("\n")
    from dpsyngen.privacy.ledger import Ledger
    from dpsyngen.training.private import charged_steps

    assert 3 <= done <= charged_steps(Ledger(out / "private" / "ledger.jsonl"))
