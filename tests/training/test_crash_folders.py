"""Run directories put together from different times, or without a file: refused, or mended where nothing is lost."""

from __future__ import annotations

import ast
import fcntl
import json
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import dpsyngen
import dpsyngen.privacy.noise as noise_module
from dpsyngen import fit as api
from dpsyngen.config import load_config
from dpsyngen.data import load_images
from dpsyngen.errors import DpsyngenError, LedgerError, RunError
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.training.log import JsonLines
from dpsyngen.training.pipeline import Training, require_unfinished
from dpsyngen.training.private import charged_steps
from dpsyngen.training.run import Run
from tests.conftest import TINY_SETTINGS, tiny_arrays
from tests.training.crash_lives import content, require_sound
from tests.training.short_runs import resume, start

pytestmark = pytest.mark.slow

STEPS = 6


def begin(settings: dict, images, out: Path, until: int | None = None, seed: int | None = 7) -> Training:
    """A run that goes on for `until` private steps and then loses what it did since its last checkpoint."""
    config = load_config({**settings, "stages": {"variant": "dpdm"}, "privacy": {"epsilon": 8, "insecure_seed": seed}})
    training = start(config, load_images(images), out)
    for progress in training.steps():
        if progress.step == until:
            break
    return training


def finish(out: Path, images) -> Training:
    training = resume(Run(out), load_images(images))
    for _ in training.steps():
        pass
    return training


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Runs that tests copy: a whole one, and two that stopped after five steps."""
    folder = tmp_path_factory.mktemp("made")
    begin(TINY_SETTINGS, tiny_arrays(), folder / "whole")
    begin(TINY_SETTINGS, tiny_arrays(), folder / "five", until=5)
    begin(TINY_SETTINGS, tiny_arrays(), folder / "other", until=5, seed=8)
    return folder


@pytest.fixture
def whole(made) -> dict[str, bytes]:
    return content(made / "whole")


@pytest.fixture
def out(made, tmp_path) -> Path:
    """Five steps taken, six charged, checkpoints at two and four."""
    shutil.copytree(made / "five", tmp_path / "r")
    return tmp_path / "r"


# ---------------------------------------------------------------------------------- files that are missing


CHARGED_AND_LOST = {
    "randomness.json": "would get fresh noise",
    "ledger.jsonl": "is missing, though the run had begun|is gone",
    "ledger.jsonl.head": "missing or damaged",
    "data.json": "nothing says any more that the images are the same",
    "config.yaml": "configuration of .* cannot be read",
}


@pytest.mark.parametrize("name", CHARGED_AND_LOST)
def test_lost_file_of_a_run_that_has_charged_is_refused(out, tiny_images, name) -> None:
    (out / "private" / name).unlink()
    with pytest.raises(DpsyngenError, match=CHARGED_AND_LOST[name]):
        finish(out, tiny_images())
    assert not (out / "private" / name).exists()


def test_ledger_lost_with_its_head_is_not_begun_anew(out, tiny_images) -> None:
    for name in ("ledger.jsonl", "ledger.jsonl.head"):
        (out / "private" / name).unlink()
    with pytest.raises(RunError, match=r"ledger.jsonl is missing, though the run had begun"):
        finish(out, tiny_images())
    (out / "private" / "data.json").unlink()
    with pytest.raises(RunError, match=r"ledger.jsonl is missing, though the run had begun"):
        finish(out, tiny_images())


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"fingerprint": 3}', "\x00\x00"])
@pytest.mark.parametrize("name", ["randomness.json", "data.json", "ledger.jsonl", "ledger.jsonl.head", "engine.json"])
def test_damaged_file_of_a_run_that_has_charged_is_refused(out, tiny_images, name, content) -> None:
    (out / "private" / name).write_text(content)
    with pytest.raises(DpsyngenError) as caught:
        finish(out, tiny_images())
    assert name in str(caught.value)
    assert (out / "private" / name).read_text() == content


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "checkpoint-previous.safetensors", "training.jsonl"])
@pytest.mark.parametrize(
    "damage", [None, b"", b"\xff\x00", b'{"phase": "context"}\n[]\nnull\n{"phase": 1, "step": "x"}\n{']
)
def test_what_can_be_made_again_is(out, whole, tiny_images, name, damage) -> None:
    """Lost checkpoints and logs cost time, never the result; steps are repeated, not charged again."""
    path = out / "private" / name
    path.unlink() if damage is None else path.write_bytes(damage)
    finish(out, tiny_images())
    after = content(out)
    after.pop("private/training.jsonl"), whole.pop("private/training.jsonl")
    assert after == whole
    require_sound(out, STEPS)


def test_both_checkpoints_lost(out, whole, tiny_images) -> None:
    for path in (out / "private").glob("checkpoint*"):
        path.unlink()
    finish(out, tiny_images())
    assert content(out) == whole


def test_key_is_made_anew_only_while_nothing_can_have_used_it(tmp_path, tiny_settings, tiny_images) -> None:
    """What a version that wrote in place left: a run with an empty key and nothing else."""
    config = load_config({**tiny_settings, "stages": {"variant": "dpdm"}, "privacy": {"epsilon": 8}})
    run = Run.create(tmp_path / "r", config)
    run.randomness_path.write_text("")
    del run
    training = finish(tmp_path / "r", tiny_images())
    assert training.randomness.secure
    require_sound(training.run.path, STEPS)


# --------------------------------------------------------------------------- files of different times or runs


def copies(out: Path, names: tuple[str, ...], to: Path) -> Callable[[], None]:
    """Keep files as they are now; the result puts them back."""
    to.mkdir()
    for name in names:
        shutil.copy(out / "private" / name, to / name)

    def put_back() -> None:
        for name in names:
            shutil.copy(to / name, out / "private" / name)

    return put_back


LEDGER = ("ledger.jsonl", "ledger.jsonl.head")


def test_ledger_of_an_earlier_time_is_refused(tmp_path, tiny_settings, tiny_images) -> None:
    """The charges that it lost would be made up for by fewer steps to come."""
    out = tmp_path / "r"
    begin(tiny_settings, tiny_images(), out, until=1)
    put_back = copies(out, LEDGER, tmp_path / "old")
    training = resume(Run(out), load_images(tiny_images()))
    for progress in training.steps():
        if progress.step == 4:
            training.stop_requested = True
    put_back()
    assert charged_steps(Ledger(out / "private" / "ledger.jsonl")) == 2
    with pytest.raises(RunError, match="put back to an earlier state"):
        finish(out, tiny_images())
    assert not Run(out).complete


@pytest.mark.parametrize("name", LEDGER)
def test_half_of_a_ledger_of_an_earlier_time_is_refused(tmp_path, tiny_settings, tiny_images, name) -> None:
    out = tmp_path / "r"
    begin(tiny_settings, tiny_images(), out, until=1)
    put_back = copies(out, (name,), tmp_path / "old")
    training = resume(Run(out), load_images(tiny_images()))
    for progress in training.steps():
        if progress.step == 5:
            break
    put_back()
    with pytest.raises(LedgerError, match=r"cut off|lines more"):
        finish(out, tiny_images())


def test_whole_private_half_of_an_earlier_time_gives_the_same_weights(
    tmp_path, whole, tiny_settings, tiny_images, monkeypatch
) -> None:
    """Its key, ledger and checkpoints are of one time, so it is that time again: the same steps, all charged."""
    out = tmp_path / "r"
    begin(tiny_settings, tiny_images(), out, until=3)
    shutil.copytree(out / "private", tmp_path / "old")

    def stop(*_: object) -> None:
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(api, "write_release", stop)
        training = resume(Run(out), load_images(tiny_images()))
        with pytest.raises(InterruptedError):
            for _ in training.steps():
                pass
    assert Run(out).weights("context").exists()  # the release half is newer
    shutil.rmtree(out / "private")
    shutil.copytree(tmp_path / "old", out / "private")
    finish(out, tiny_images())
    assert content(out) == whole


@pytest.mark.parametrize("name", ["randomness.json", "ledger", "data.json", "checkpoint.safetensors"])
def test_file_of_another_run_is_refused(made, out, tiny_images, name) -> None:
    """Even a run on the same images with the same settings."""
    for n in LEDGER if name == "ledger" else (name,):
        shutil.copy(made / "other" / "private" / n, out / "private" / n)
    with pytest.raises(RunError, match=r"not the random state|images are not those|different runs"):
        finish(out, tiny_images())
    assert not Run(out).complete


def test_finished_release_with_an_older_private_half_is_not_trained_again(tmp_path, tiny_settings, tiny_images) -> None:
    out = tmp_path / "r"
    begin(tiny_settings, tiny_images(), out, until=3)
    shutil.copytree(out / "private", tmp_path / "old")
    finish(out, tiny_images())
    before = content(out / "release")
    shutil.rmtree(out / "private")
    shutil.copytree(tmp_path / "old", out / "private")
    with pytest.raises(RunError, match="finished already"):
        finish(out, tiny_images())
    for use in (
        lambda: dpsyngen.evaluate(out, data=tiny_images(), images=9, classifiers=()),
        lambda: dpsyngen.write_report(out),
    ):
        with pytest.raises(RunError, match="of an earlier time"):
            use()
    assert content(out / "release") == before


@pytest.mark.parametrize(
    ("old", "new", "setting"),
    [
        ("clipping_norm: 1.0", "clipping_norm: 2.0", "privacy.clipping_norm"),
        ("copies: 2", "copies: 1", "private.copies"),
        ("label_dropout: 0.1", "label_dropout: 0.2", "network.label_dropout"),
        ("noise_mean: -1.2", "noise_mean: 0.0", "network.noise_mean"),
        ("beta1: 0.9", "beta1: 0.8", "private.beta1"),
    ],
)
def test_settings_that_make_other_sums_under_the_same_noise_are_refused(out, tiny_images, old, new, setting) -> None:
    path = out / "private" / "config.yaml"
    text = path.read_text()
    assert text.count(old) >= 1, text
    path.write_text(text.replace(old, new))
    with pytest.raises(RunError, match=f"was changed since the run was started .*{setting}"):
        finish(out, tiny_images())
    path.write_text(text)
    finish(out, tiny_images())


def test_settings_that_do_not_matter_to_a_step_may_change(out, whole, tiny_images) -> None:
    path = out / "private" / "config.yaml"
    path.write_text(path.read_text().replace("checkpoint_every: 2", "checkpoint_every: 3"))
    finish(out, tiny_images())
    assert content(out / "release" / "weights") == {
        k.removeprefix("release/weights/"): v for k, v in whole.items() if k.startswith("release/weights/")
    }


def test_damaged_weights_of_an_earlier_phase_are_named(tmp_path, tiny_settings, tiny_images) -> None:
    config = load_config(
        {**tiny_settings, "stages": {"variant": "finetune"}, "privacy": {"epsilon": 8, "insecure_seed": 7}}
    )
    training = start(config, load_images(tiny_images()), tmp_path / "r")
    for progress in training.steps():
        if progress.phase == "context":
            break
    path = training.run.weights("pretrain")
    good = path.read_bytes()
    path.write_bytes(good[:-10])
    with pytest.raises(RunError, match=r"pretrain.safetensors is damaged.*Remove it"):
        finish(tmp_path / "r", tiny_images())
    path.unlink()
    finish(tmp_path / "r", tiny_images())
    assert path.read_bytes() == good


def test_checkpoints_of_a_finished_run_are_cleared(out, whole, tiny_images) -> None:
    """A kill between the last file of the release and the removal of the checkpoints."""
    kept = {p.name: p.read_bytes() for p in (out / "private").glob("checkpoint*")}
    assert len(kept) == 2
    finish(out, tiny_images())
    for name, data in kept.items():
        (out / "private" / name).write_bytes(data)
    with pytest.raises(RunError, match="finished already"):
        require_unfinished(Run(out))
    assert content(out) == whole


def test_whatever_writes_is_refused_while_another_process_works_on_the_run(made, out, tiny_images, monkeypatch) -> None:
    """Before it has done anything: no work is thrown away at the end, and nothing is half done."""
    finished = out.with_name("finished")
    shutil.copytree(made / "whole", finished)
    before = content(out), content(finished)
    said: list[str] = []
    read = api._read
    monkeypatch.setattr(api, "_read", lambda *_: pytest.fail("images were read, which can take long"))
    for path, use in (
        (out, lambda: finish(out, tiny_images())),
        (out, lambda: api.prepare_resume(out, tiny_images())),
        (finished, lambda: dpsyngen.evaluate(finished, data=tiny_images(), images=9, on_progress=said.append)),
        (finished, lambda: dpsyngen.write_report(finished)),
    ):
        with open(path / "private" / "lock") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)  # as another process would hold it
            with pytest.raises(RunError, match="another process is working"):
                use()
    monkeypatch.setattr(api, "_read", read)
    assert (content(out), content(finished)) == before
    assert said == []
    # This process holds the lock from the moment that it opens the run, gives it to nobody while it trains, and gives
    # it back at the end, however that comes.
    training = resume(Run(out), load_images(tiny_images()))
    with open(out / "private" / "lock") as handle, pytest.raises(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    steps = training.steps()
    next(steps)
    with pytest.raises(RunError, match="another process is working"):
        Run(out).open_for_writing()
    steps.close()
    with open(out / "private" / "lock") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_starting_where_a_run_is_says_how_to_go_on(made, out, tiny_settings, tiny_images) -> None:
    config = load_config({**tiny_settings, "privacy": {"epsilon": 8}})
    with pytest.raises(RunError, match=f"holds an unfinished run.*--resume --out {out}"):
        api.prepare(config, out, tiny_images())
    spaced = out.rename(out.with_name("with a space"))
    with pytest.raises(RunError, match=f"--resume --out '{spaced}'"):
        api.prepare(config, spaced, tiny_images())
    with pytest.raises(RunError, match=f"--resume --out '{spaced}'"):
        Run(spaced).require_complete()
    with pytest.raises(RunError, match="holds a finished run"):
        api.prepare(config, made / "whole", tiny_images())


def test_measured_kernels_are_on_the_disk_before_noise_is_used_with_them(
    tmp_path, tiny_settings, tiny_images, monkeypatch
) -> None:
    """Else a step that is repeated after a crash could be summed in another order under the same noise."""
    real, seen = noise_module.noisy_mean, []

    def spy(clipped, **constants):
        stored = json.loads((tmp_path / "r" / "private" / "engine.json").read_text())
        seen.append(len(stored["kernels"]))
        return real(clipped, **constants)

    monkeypatch.setattr(noise_module, "noisy_mean", spy)
    training = begin(tiny_settings, tiny_images(), tmp_path / "r", seed=None)
    chosen = json.loads(training.run.engine_path.read_text())["kernels"]
    assert len(seen) == STEPS
    assert seen[0] > 0
    assert seen[-1] == len(chosen)


# ------------------------------------------------------------------------------------------------- logs


def test_log_leaves_out_what_it_cannot_read(tmp_path) -> None:
    log = JsonLines(tmp_path / "l", 0o600)
    log.append(phase="a", step=1, loss=0.5)
    with open(log.path, "ab") as f:
        f.write(b'{"phase": "a", "step"\n\xff\xfe\n[1]\n{"phase": "a"}\n{"phase": "a", "step": true}\n')
    log.append(phase="a", step=2, loss=0.25)
    with open(log.path, "ab") as f:
        f.write(b'{"phase": "a", "step": 3')
    good = [{"phase": "a", "step": 1, "loss": 0.5}, {"phase": "a", "step": 2, "loss": 0.25}]
    assert log.read() == good
    log.cut("a", 9)
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == good
    log.cut("a", 2)
    assert log.read() == good[:1]
    log.cut("b", 0)
    assert log.read() == good[:1]
    assert log.path.stat().st_mode & 0o777 == 0o600


# ------------------------------------------------------------------------------------------------ the clock


CLOCKS = ("time", "monotonic", "perf_counter", "time_ns", "monotonic_ns", "perf_counter_ns", "process_time")


def test_a_clock_that_jumps_changes_nothing(tmp_path, whole, tiny_settings, tiny_images, monkeypatch) -> None:
    rng = random.Random(1)
    for name in CLOCKS:
        jump = (lambda: rng.randrange(-(10**18), 10**18)) if name.endswith("_ns") else (lambda: rng.uniform(-1e9, 1e12))
        monkeypatch.setattr(time, name, jump)
    out = tmp_path / "r"
    begin(tiny_settings, tiny_images(), out, until=3)
    finish(out, tiny_images())
    assert content(out) == whole


def test_training_does_not_look_at_a_clock(tmp_path, whole, tiny_settings, tiny_images, monkeypatch) -> None:
    """Not of the code in dpsyngen, at any rate; what is measured to choose kernels is not with a seed."""
    looked: list[str] = []
    for name in CLOCKS:

        def look(real: Callable[[], float] = getattr(time, name), name: str = name) -> float:
            module = sys._getframe(1).f_globals.get("__name__", "")
            if module.startswith("dpsyngen") and module != "dpsyngen.training.log":
                looked.append(name)
            return real()

        monkeypatch.setattr(time, name, look)
    begin(tiny_settings, tiny_images(), tmp_path / "r")
    assert looked == []
    assert content(tmp_path / "r") == whole


def test_only_the_logs_of_the_private_half_and_the_choice_of_kernels_import_a_clock() -> None:
    root = Path(api.__file__).parent
    importing = {
        str(path.relative_to(root))
        for folder in ("training", "privacy", "diffusion", "programs", "data")
        for path in (root / folder).rglob("*.py")
        if "audit" not in path.parts  # says how long it took; trains nothing that is released
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        and {"time", "datetime"} & {a.name for a in node.names} | {getattr(node, "module", None)} & {"time", "datetime"}
    }
    assert importing == {"privacy/kernels.py", "training/log.py"}


def test_randomness_of_a_damaged_file_never_passes_for_secure(tmp_path) -> None:
    Randomness.from_insecure_seed(3).save(tmp_path / "k")
    stored = json.loads((tmp_path / "k").read_text())
    for wrong in (4, "3", 3.0, True):
        (tmp_path / "k").write_text(json.dumps(stored | {"insecure_seed": wrong}))
        with pytest.raises(RunError, match="cannot be read"):
            Randomness.load(tmp_path / "k")
