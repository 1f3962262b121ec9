"""The command line for programs: what it prints, writes and refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dpsyngen.programs import make_program, program_names


@pytest.fixture
def call(capfd):
    """Run the command line in this process; returns (exit status, stdout, stderr)."""
    import dpsyngen.cli.app as cli

    def run(*arguments):
        before = sys.argv
        sys.argv = ["dpsyngen", "programs", *map(str, arguments)]
        code = 0
        try:
            cli.main()
        except SystemExit as error:
            code = error.code or 0
        finally:
            sys.argv = before
        return code, *capfd.readouterr()

    return run


def test_list_names_every_program_and_its_tier(call) -> None:
    code, out, _ = call("list")
    assert code == 0
    rows = {line.split()[0]: line.split()[1] for line in out.splitlines()[1 : 1 + len(program_names())]}
    assert list(rows) == program_names()
    assert rows["dead-leaves"] == "0"
    assert rows["strokes"] == "1"
    assert rows["mixture"] == "–"
    assert "agnostic" in out
    assert "domain simulator" not in out  # no program here is one
    assert all(len(line) <= 140 for line in out.splitlines())


@pytest.mark.parametrize("name", program_names())
def test_show_explains_every_parameter(call, name) -> None:
    from dataclasses import fields

    from dpsyngen.programs.registry import program_class

    code, out, _ = call("show", name)
    assert code == 0
    for field in fields(program_class(name)):
        if field.name not in ("resolution", "channels", "seed"):
            assert field.name in out.partition("Defaults:")[0], field.name
            assert f"{field.name}=" in out.partition("Defaults:")[2], field.name


def test_show_draws_a_grid(call, tmp_path) -> None:
    target = tmp_path / "g.png"
    code, out, _ = call("show", "dead-leaves", "--set", "shape=disc", "--out", target, "-n", 4, "--channels", "rgb")
    assert code == 0
    assert "tier 0: agnostic" in out
    assert Image.open(target).mode == "RGB"


def test_what_show_proposes_works(call, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mixture", "blur"):
        proposed = call("show", name)[1].splitlines()[-1].partition("dpsyngen ")[2]
        # As a shell reads it.
        words = subprocess.run(f"printf '%s\\0' {proposed}", shell=True, capture_output=True, text=True).stdout
        assert words.startswith("programs\0")
        code, _, err = call(*words.split("\0")[1:-1])
        assert code == 0, err
        assert (tmp_path / f"{name}.png").stat().st_size > 100


def test_save_writes_images_and_a_manifest(call, tmp_path) -> None:
    out = tmp_path / "o"
    code, said, _ = call(
        *("save", "mixture", "-n", 12, "--out", out, "--resolution", 9, "--seed", 3),
        *("--set", "programs=[strokes, {name: contours, shape: polygon}]", "--set", "weights=[1, 2]"),
    )
    assert code == 0
    assert "12 images of mixture" in said
    about = json.loads((out / "manifest.json").read_text())
    assert about["prior_tier"] == 1
    saved = np.stack([np.asarray(Image.open(path)) for path in sorted((out / "images").iterdir())])
    assert np.array_equal(saved.transpose(0, 3, 1, 2), make_program(**about["program"]).batch(range(12)))
    assert call("save", "mixture", "-n", 12, "--out", out)[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "live-leaves"], "live-leaves"),
        (["show", "dead-leaves", "--out", "{}/taken.png"], "exists"),
        (["show", "dead-leaves", "--out", "{}/h.jpg"], ".png"),
        (["show", "dead-leaves", "--out", "{}/h.png", "--set", "shape=heart"], "heart"),
        (["show", "dead-leaves", "--set", "shape=heart"], "heart"),
        (["show", "dead-leaves", "--out", "{}/h.png", "--channels", "blue"], "grey or rgb"),
        (["show", "dead-leaves", "--channels", "blue"], "grey or rgb"),
        (["show", "dead-leaves", "--out", "{}/h.png", "--resolution", "0"], "resolution is 0"),
        (["show", "dead-leaves", "--out", "{}/h.png", "-n", "0"], "count is 0"),
        (["show", "dead-leaves", "--out", "{}/h.png", "--set", "shape"], "name=value, such as shape=disc"),
        (["show", "dead-leaves", "--out", "{}/h.png", "--set", "seed=4"], "--seed"),
        (["show", "dead-leaves", "--out", "{}/h.png", "--set", "name=strokes"], "give it as NAME"),
        (["save", "dead-leaves", "--out", "{}/o", "-n", "0"], "count is 0"),
        (["save", "dead-leaves", "--out", "{}/o", "-n", "5", "--format", "jpeg"], "jpeg"),
        (["save", "dead-leaves", "--out", "{}/o", "-n", "5", "--seed", "-1"], "seed is -1"),
        (["save", "dead-leaves", "--out", "{}/o", "-n", "5", "--workers", "0"], "workers is 0"),
        (["save", "dead-leaves", "--out", "{}/o", "-n", "5", "--shard-size", "0"], "shard_size is 0"),
        (["save", "dead-leaves", "--out", "{}/o", "-n", "5", "--start", "-2"], "start is -2"),
        (["save", "dead-leaves", "--out", "{}/taken.png", "-n", "5"], "exists already"),
        (["save", "blur", "--out", "{}/o", "-n", "5"], "needs a value for source"),
        (["save", "dead-leaves", "--out", "{}/o", "-n", "5", "--set", "r_min=2"], "r_min is 2"),
    ],
)
def test_bad_input(call, tmp_path, arguments, message) -> None:
    (tmp_path / "taken.png").write_bytes(b"mine")
    code, _, err = call(*(a.replace("{}", str(tmp_path)) for a in arguments))
    assert code == 2
    assert message in err
    assert [p.name for p in tmp_path.iterdir()] == ["taken.png"]
