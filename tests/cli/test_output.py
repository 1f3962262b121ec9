"""What each command writes where: one JSON document for programs, nothing but results when quiet, errors as JSON."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import dpsyngen
from dpsyngen.console import Console
from dpsyngen.files import strict, strict_text
from dpsyngen.privacy.budget import Budget
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.training.run import Run
from tests.conftest import TINY_SETTINGS, tiny_arrays

pytestmark = pytest.mark.slow

DOCUMENT = Path(__file__).parents[2] / "docs" / "logging.md"
SMALL = [
    *("--network", "nano", "--public-steps", 2, "--steps", 4, "--batch", 12, "-k", 1, "--physical-batch", 8),
    *("--set", "public.batch=4", "--set", "sampling.steps=3", "--variant", "cleaning", "--delta", "1e-3"),
]


def strictly(text: str) -> dict[str, Any]:
    """The one JSON document that `text` is; no NaN, no Infinity."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    document = json.loads(text, parse_constant=refuse)
    assert isinstance(document, dict)
    return document


def documented(command: str) -> set[str]:
    """The keys that docs/logging.md promises of a command's result."""
    section = DOCUMENT.read_text(encoding="utf-8").split("\n### Results\n", 1)[1].split("\n### ", 1)[0]
    row = next(line for line in section.splitlines() if line.startswith(f"| `{command}` |"))
    return set(re.findall(r"`(\w+)`", row.split("|")[2]))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with: images d.npz, a finished run r, a stopped run s, a budget b, a bundle z.zip."""
    folder = tmp_path_factory.mktemp("made")
    images, labels = tiny_arrays()
    np.savez(folder / "d.npz", images=images, labels=labels)
    settings = {
        **TINY_SETTINGS,
        "stages": {"variant": "cleaning"},
        "data": {"source": str(folder / "d.npz")},
        "privacy": {"delta": 1e-3},
    }
    dpsyngen.train(folder / "d.npz", epsilon=3.0, out=folder / "r", settings=settings)
    Budget.create(folder / "b", epsilon_limit=9, delta=1e-3)
    config = dpsyngen.load_config({**settings, "privacy": {"epsilon": 3.0, "delta": 1e-3, "budget": str(folder / "b")}})
    from dpsyngen import fit as api
    from dpsyngen.release.bundle import pack

    training = api.prepare(config, folder / "s")
    for progress in training.steps():
        training.stop_requested = progress.phase == "context"
    dpsyngen.write_report(folder / "r")
    specification = {
        "name": "tiny",
        "data": {"train": str(folder / "d.npz")},
        "settings": {k: v for k, v in TINY_SETTINGS.items() if k not in ("sampling", "stages")},
        "grid": {"variant": ["dpdm"], "epsilon": [3], "seeds": 1},
        "sampling": {"images": 12, "steps": 2},
        "references": [],
        "evaluation": {"features": ["pixels-pca"], "metrics": ["frechet"], "classifiers": [], "bootstrap": 0},
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(specification), encoding="utf-8")
    with Run(folder / "r").lock():
        pack(Run(folder / "r"), folder / "z.zip", samples=2, seed=1)
    return folder


COMMANDS: dict[str, tuple[str, ...]] = {
    "train": ("train", "--data", "{made}/d.npz", "--epsilon", "3", "--out", "{new}/t", *map(str, SMALL)),
    "sample": ("sample", "{made}/r", "-n", "4", "--out", "{new}/s.npz"),
    "evaluate": (
        *("evaluate", "{made}/r", "-n", "30", "--features", "pixels-pca", "--metrics", "frechet"),
        *("--classifiers", "", "--bootstrap", "0"),
    ),
    "report": ("report", "{made}/r"),
    "plan": ("plan", "--records", "1000", "--noise", "3", "--batch", "100", "--steps", "10"),
    "ledger": ("ledger", "{made}/r", "--delta", "1e-4", "--group-size", "3"),
    "budget new": ("budget", "new", "{new}/b", "--epsilon", "2", "--delta", "1e-4"),
    "budget show": ("budget", "show", "{made}/b"),
    "budget settle": ("budget", "settle", "{copy}/b", "{copy}/s"),
    "release": ("release", "{made}/r", "{new}/z.zip", "--samples", "2"),
    "verify": ("verify", "{made}/z.zip"),
    "export": ("export", "{made}/r", "--out", "{new}/e"),
    "key": ("key", "{new}/k.pem"),
    "audit": ("audit", "{made}/r", "--quick", "--confidence", "0.999999"),  # else 1 in 1,000 fails by chance
    "memorisation": ("memorisation", "{made}/r", "-n", "30"),
    "doctor": ("doctor", "{made}/r"),
    "stages": (
        *("stages", "--programs", "dead-leaves,contours", "--resolution", "8", "--network", "nano", "--steps", "2"),
        *("--seeds", "1", "--images", "8", "--spacing", "2", "--set", "public.batch=2", "--out", "{new}/g"),
    ),
    "compare": ("compare", "{made}/c.yaml", "--out", "{new}/x"),
    "compare --dry-run": ("compare", "{made}/c.yaml", "--dry-run"),
    "programs list": ("programs", "list"),
    "programs show": ("programs", "show", "dead-leaves"),
    "programs show --out": ("programs", "show", "dead-leaves", "--out", "{new}/p.png", "-n", "2"),
    "programs save": ("programs", "save", "dead-leaves", "--out", "{new}/p", "-n", "2", "--resolution", "8"),
}
CODES = {"doctor": {0, 5}}


@pytest.fixture
def command(made, tmp_path, call, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """Run one of COMMANDS by name, with more options; stages with moments of fewer images than ship."""
    monkeypatch.setattr("dpsyngen.thresholds.denoisers._FOR_MOMENTS", 500)

    def run(name: str, *more: str) -> tuple[int, str, str]:
        import shutil

        if "{copy}" in str(COMMANDS[name]):
            for entry in ("b", "b.head", "s"):
                if (made / entry).is_dir():
                    shutil.copytree(made / entry, tmp_path / "copy" / entry)
                elif (made / entry).exists():
                    (tmp_path / "copy").mkdir(exist_ok=True)
                    shutil.copy(made / entry, tmp_path / "copy" / entry)
        new = tmp_path / f"new{len(list(tmp_path.iterdir()))}"
        new.mkdir()
        return call(*(a.format(made=made, new=new, copy=tmp_path / "copy") for a in COMMANDS[name]), *more)

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_json_is_one_document_with_the_documented_keys(name, command) -> None:
    code, out, err = command(name, "--json", "-q")
    assert code in CODES.get(name, {0}), err
    assert err == ""
    document = strictly(out)
    assert out.count("\n") == 1
    assert out.endswith("\n")
    assert set(document) == documented(name)


@pytest.mark.parametrize("name", ["train", "sample", "plan", "ledger", "verify", "doctor", "programs list"])
def test_quiet_says_nothing_but_the_result(name, command) -> None:
    code, out, err = command(name, "-q")
    assert code in CODES.get(name, {0}), err
    assert err == ""
    assert out.strip()
    assert not out.startswith("{")


def test_every_command_has_both_options() -> None:
    import typer

    from dpsyngen.cli.app import app

    def walk(group: Any, prefix: str) -> dict[str, Any]:
        out = {}
        for name, command in group.commands.items():
            inner = getattr(command, "commands", None)
            out |= walk(command, f"{prefix}{name} ") if inner else {prefix + name: command}
        return out

    commands = walk(typer.main.get_command(app), "")
    assert {n.removesuffix(" --out").removesuffix(" --dry-run") for n in COMMANDS} <= set(commands)
    for name, command in commands.items():
        options = {o for p in command.params for o in p.opts}
        assert {"--json", "--quiet", "-q"} <= options, name


def test_summary_of_a_training(command, tmp_path) -> None:
    _, out, err = command("train", "--json", "-q")
    document = strictly(out)
    run = Run(Path(document["run"]))
    assert run.complete
    assert document["release"] == str(run.release)
    assert document["epsilon"] == Ledger(run.ledger_path).epsilon()
    assert document["private"] is True
    assert document["delta"] == 1e-3
    assert document["seconds"] > 0
    assert {f["code"] for f in document["findings"]} >= {"few-steps"}
    assert err == ""


def test_infinity_is_a_word(command, made) -> None:
    _, out, _ = command("train", "--json", "--epsilon", "inf")
    document = strictly(out)
    assert document["epsilon"] == "inf"
    assert document["private"] is False
    assert strict({"a": [math.nan, -math.inf, 1.5], "b": (Path("x"),)}) == {"a": ["nan", "-inf", 1.5], "b": ["x"]}
    assert strict_text({"ε": math.inf}) == '{"ε": "inf"}'


@pytest.mark.parametrize(
    ("arguments", "kind", "code"),
    [
        (["train", "--epsilon", "0", "--data", "{made}/d.npz", "--out", "{new}"], "config", 2),
        (["train", "--epsilon", "1", "--data", "{made}/none", "--out", "{new}"], "data", 2),
        (["train", "--epsilon", "9.5", "--budget", "{made}/b", "--data", "{made}/d.npz", "--out", "{new}", *SMALL],
         "budget", 3),
        (["report", "{made}/none"], "run", 2),
        (["sample", "{made}/s", "--out", "{new}"], "run", 2),
        (["plan"], "usage", 2),
        (["plan", "--records", "many"], "usage", 2),
        (["nonsense"], "usage", 2),
        (["train", "--log-format", "xml", "--out", "{new}"], "config", 2),
    ],
)  # fmt: skip
def test_errors_are_json_too(arguments, kind, code, call, made, tmp_path) -> None:
    words = [str(a).format(made=made, new=tmp_path / "new") for a in arguments]
    plain = call(*words)
    found, out, err = call(*words, "--json")
    assert found == plain[0] == code
    document = strictly(out)
    assert set(document) == {"error"}
    assert set(document["error"]) == {"kind", "message"}
    assert document["error"]["kind"] == kind
    assert document["error"]["message"] in " ".join(err.split()) or document["error"]["message"] in err
    assert plain[1] == ""
    assert not (tmp_path / "new").exists()


def test_full_disk_and_interruption_as_json(call, made, tmp_path, monkeypatch) -> None:
    import dpsyngen.training.checkpoint as checkpoint_module

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    train = ["train", "--data", made / "d.npz", "--epsilon", 3, *SMALL, "--json"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "save_file", full)
        code, out, _ = call(*train, "--out", tmp_path / "a", "--set", "private.checkpoint_every=2")
    assert code == 1
    assert strictly(out)["error"]["kind"] == "disk-full"
    with monkeypatch.context() as patch:
        patch.setattr("dpsyngen.fit.prepare", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        code, out, _ = call(*train, "--out", tmp_path / "b")
    assert code == 130
    assert strictly(out)["error"]["kind"] == "interrupted"
    with monkeypatch.context() as patch:
        patch.setattr("dpsyngen.fit.prepare", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call(*train, "--out", tmp_path / "c")


def test_stopped_training_says_so_in_json(call, made, tmp_path, monkeypatch) -> None:
    from dpsyngen.training.pipeline import Training

    real = Training.steps

    def stopped(self: Training) -> Any:
        for progress in real(self):
            self.stop_requested = progress.phase == "context"
            yield progress

    monkeypatch.setattr(Training, "steps", stopped)
    train = ["train", "--data", made / "d.npz", "--epsilon", 3, *SMALL, "--out", tmp_path / "a"]
    code, out, _ = call(*train, "--json")
    assert code == 130
    error = strictly(out)["error"]
    assert error["kind"] == "interrupted"
    assert f"--resume --out {tmp_path / 'a'}" in error["message"]
    monkeypatch.undo()
    (made / "d.npz").rename(made / "moved.npz")
    try:
        code, _, err = call("train", "--resume", "--out", tmp_path / "a")
        assert code == 2
        assert "if they have moved, say where with --data" in err
        assert call("train", "--resume", "--out", tmp_path / "a", "--data", made / "moved.npz")[0] == 0
    finally:
        (made / "moved.npz").rename(made / "d.npz")


def test_progress_as_json_lines_has_no_private_figure(made, tmp_path, call, monkeypatch) -> None:
    monkeypatch.setattr("dpsyngen.console.Progress.every", 0.0)
    train = ["train", "--data", made / "d.npz", "--epsilon", 3, *SMALL, "--out", tmp_path / "a"]
    code, out, err = call(*train, "--log-format", "json", "--json")
    assert code == 0
    assert strictly(out)["run"] == str(tmp_path / "a")
    events = [strictly(line) for line in err.splitlines()]
    assert {e["event"] for e in events} == {"note", "progress", "finished"}
    assert [e["title"].split(":")[0] for e in events if e["event"] == "finished"] == ["cleaning", "context"]
    steps = [e for e in events if e["event"] == "progress"]
    assert steps
    for e in steps:
        assert set(e) == {"time", "event", "title", "done", "total", "unit", "per_second", "seconds_left"}
    assert "loss" not in err
    # In words it is there, for the person at the terminal.
    _, _, err = call(*train[:-1], tmp_path / "b")
    assert "(private)" in err
    code, _, err = call("train", "--out", tmp_path / "a", "--log-format=json")
    assert code == 2
    assert strictly(err)["event"] == "error"


def test_standard_output_of_the_process_itself_is_the_document(made, tmp_path) -> None:
    """Not only of what goes through Python's sys.stdout."""
    done = subprocess.run(
        [sys.executable, "-m", "dpsyngen", "sample", made / "r", "-n", "2", "--out", tmp_path / "s.npz", "--json"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0
    assert strictly(done.stdout)["images"] == 2


def test_what_is_asked_for_is_seen_before_anything_else() -> None:
    for words, as_json, log_json in (
        (["train", "--json"], True, False),
        (["train", "--", "--json"], False, False),
        (["train", "--log-format", "json"], False, True),
        (["train", "--log-format=json", "--json"], True, True),
        (["train", "--log-format", "text", "json"], False, False),
    ):
        console = Console.asked_for(words)
        assert (console.as_json, console.log_json) == (as_json, log_json), words


def test_warnings_are_said_however_quiet(capsys) -> None:
    Console(quiet=True).warn("something was given up")
    assert capsys.readouterr().err == "dpsyngen: warning: something was given up\n"
    Console(quiet=True, log_format="json").warn("something")
    assert strictly(capsys.readouterr().err)["event"] == "warning"
