"""Ledger, budget, release, verify and key as a user meets them: one wrong input per option, exit codes, plain words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import dpsyngen
from dpsyngen.privacy.accounting import Mechanism, epsilon
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.training.run import Run
from tests.conftest import TINY_SETTINGS, tiny_arrays

pytestmark = pytest.mark.slow

SMALL = [
    *("--network", "nano", "--public-steps", 2, "--steps", 4, "--batch", 12, "-k", 1, "--physical-batch", 8, "-q"),
    *("--set", "public.batch=4", "--set", "sampling.steps=3", "--delta", "1e-3"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for name, e in (("a", 2.0), ("b", 4.0)):
        settings = {**TINY_SETTINGS, "privacy": {"delta": 1e-3}}
        dpsyngen.train(tiny_arrays(), epsilon=e, out=folder / name, settings=settings)
    return folder / "a", folder / "b"


@pytest.fixture
def data(tmp_path) -> Path:
    images, labels = tiny_arrays()
    np.savez(tmp_path / "d.npz", images=images, labels=labels)
    return tmp_path / "d.npz"


# ------------------------------------------------------------------------------------------------ ledger


def test_ledger_of_one_run(call, runs) -> None:
    code, out, _ = call("ledger", runs[0], "--delta", "1e-3,1e-4", "--group-size", "3")
    assert code == 0
    assert "chain and head intact, as its certificate knew it" in out
    spent = Ledger(Run(runs[0]).ledger_path)
    row = next(line for line in out.splitlines() if "<- the run's" in line).split()
    assert float(row[2]) == pytest.approx(spent.epsilon(), abs=1e-4)
    assert float(row[3]) == pytest.approx(spent.epsilon(accountant="rdp"), abs=1e-4)
    table = [
        line.split() for line in out.splitlines() if line.startswith(" ") and line.split()[0] in ("0.0001", "0.001")
    ]
    values = {(r[0], r[1]): float(r[2]) for r in table}
    assert values["0.0001", "1"] == pytest.approx(spent.epsilon(1e-4), abs=1e-4)
    assert values["0.001", "3"] == pytest.approx(spent.epsilon(group_size=3), abs=1e-4)


def test_ledgers_of_two_runs_compose(call, runs) -> None:
    code, out, _ = call("ledger", *runs, "--json")
    assert code == 0
    total = json.loads(out)
    mechanisms = [m for r in runs for m in Ledger(Run(r).ledger_path).mechanisms]
    assert total["epsilon"] == epsilon(mechanisms, 1e-3)
    assert total["epsilon"] > max(Ledger(Run(r).ledger_path).epsilon() for r in runs)
    assert total["private"] is True
    assert len(total["entries"]) == 2


def test_ledger_that_was_tampered_with_is_refused(call, runs, tmp_path) -> None:
    shutil.copytree(runs[0], tmp_path / "r")
    path = Run(tmp_path / "r").ledger_path
    lines = path.read_text().split("\n")
    for changed in ([*lines[:-2], ""], [lines[0], lines[2], lines[1], *lines[3:]]):
        path.write_text("\n".join(changed))
        code, out, err = call("ledger", tmp_path / "r")
        assert (code, out) == (3, "")
        assert "o ε can be stated" in err


def test_ledger_that_was_forged_whole_is_betrayed_by_the_certificate(call, runs, tmp_path) -> None:
    """Chain and head made anew, with less noise charged."""
    shutil.copytree(runs[0], tmp_path / "r")
    path = Run(tmp_path / "r").ledger_path
    path.unlink()
    path.with_name("ledger.jsonl.head").unlink()
    Ledger.create(path, target_epsilon=2.0, delta=1e-3, records=60).charge(Mechanism(0.2, 50.0, 6), "steps")
    code, out, err = call("ledger", tmp_path / "r")
    assert (code, out) == (3, "")
    assert "not the one that its certificate was computed from" in err


def test_a_copy_of_a_run_is_no_second_run(call, runs, tmp_path) -> None:
    shutil.copytree(runs[0], tmp_path / "copy")
    assert "copies of each other" in call("ledger", runs[0], tmp_path / "copy")[2]
    assert "named twice" in call("ledger", runs[0], runs[0])[2]


def test_ledger_says_what_is_not_private(call, data, tmp_path) -> None:
    for name, options in (("seed", ["--epsilon", 4, "--insecure-seed", 1]), ("inf", ["--epsilon", "inf"])):
        assert call("train", "--data", data, "--out", tmp_path / name, *options, *SMALL)[0] == 0
        code, out, _ = call("ledger", tmp_path / name, "--group-size", "1")
        assert code == 0
        assert "NOT PRIVATE" in out
    assert json.loads(call("ledger", tmp_path / "inf", "--json")[1])["epsilon"] == "inf"
    assert json.loads(call("ledger", tmp_path / "seed", "--json")[1])["private"] is False


# ------------------------------------------------------------------------------------------------ budget


def test_budget_from_first_run_to_last(call, data, tmp_path) -> None:
    file = tmp_path / "budget.jsonl"
    assert call("budget", "new", file, "--epsilon", 5, "--delta", "1e-3")[0] == 0
    train = ["train", "--data", data, "--budget", file, *SMALL, "--batch", 60]  # all records: ε in closed form
    assert call(*train, "--epsilon", 3, "--out", tmp_path / "one")[0] == 0
    before = file.read_bytes()
    code, _, err = call(*train, "--epsilon", 5, "--out", tmp_path / "two")
    assert code == 3
    assert "above the budget of" in err
    assert "would fit" in err
    assert file.read_bytes() == before
    assert not (tmp_path / "two").exists()
    assert call(*train, "--epsilon", 2, "--out", tmp_path / "two")[0] == 0
    shown = json.loads(call("budget", "show", file, "--json")[1])
    assert [r["name"] for r in shown["runs"]] == ["one", "two"]
    composed = json.loads(call("ledger", tmp_path / "one", tmp_path / "two", "--json")[1])
    assert shown["reserved_epsilon"] == composed["epsilon"] <= 5
    text = call("budget", "show", file)[1]
    assert "one" in text
    assert "taken by all together" in text
    # The certificate speaks of the budget, the released configuration not of where it lies.
    certificate = json.loads((tmp_path / "two" / "release" / "privacy.json").read_text())
    assert certificate["budget"]["reserved_epsilon"] == shown["reserved_epsilon"]
    assert "budget" not in (tmp_path / "two" / "release" / "config.yaml").read_text()
    assert "finished" in call("budget", "settle", file, tmp_path / "one")[2]


def test_run_that_was_given_up_gives_back_what_it_did_not_use(call, data, tmp_path) -> None:
    from dpsyngen import fit as api
    from dpsyngen.privacy.budget import Budget

    file = tmp_path / "budget.jsonl"
    Budget.create(file, epsilon_limit=5, delta=1e-3)
    config = dpsyngen.load_config(
        {
            **TINY_SETTINGS,
            "data": {"source": str(data)},
            "privacy": {"epsilon": 4.9, "delta": 1e-3, "budget": str(file)},
        }
    )
    training = api.prepare(config, tmp_path / "r")
    steps = training.steps()
    for progress in steps:
        if progress.phase == "context":
            break
    steps.close()
    del training
    shutil.copytree(tmp_path / "r", tmp_path / "backup")
    full = Budget(file).epsilon()
    # Rounded up, as a bound must be.
    assert full <= float(call("budget", "show", file)[1].split("taken by all together: ε = ")[1].split()[0])
    code, out, _ = call("budget", "settle", file, tmp_path / "r")
    assert code == 0
    assert "is given up" in out
    assert 0 < Budget(file).epsilon() == Ledger(Run(tmp_path / "r").ledger_path).epsilon() < full
    # Neither the run nor a backup of it can spend again what was given back.
    for name in ("r", "backup"):
        code, _, err = call("train", "--resume", "--out", tmp_path / name, "-q")
        assert code == 3
        assert "given up" in err


def test_budget_refuses_runs_without_privacy(call, data, tmp_path) -> None:
    call("budget", "new", tmp_path / "b", "--epsilon", 5, "--delta", "1e-3")
    for options in (["--epsilon", "inf"], ["--epsilon", 1, "--insecure-seed", 1]):
        code, _, err = call("train", "--data", data, "--budget", tmp_path / "b", "--out", tmp_path / "r", *options)
        assert code == 2
        assert "without a budget" in err
    assert not (tmp_path / "r").exists()


def test_budget_of_other_images(call, data, tmp_path) -> None:
    call("budget", "new", tmp_path / "b", "--epsilon", 9, "--delta", "1e-3")
    train = ["train", "--budget", tmp_path / "b", "--epsilon", 1, *SMALL]
    assert call(*train, "--data", data, "--out", tmp_path / "one")[0] == 0
    images, labels = tiny_arrays(9)
    np.savez(tmp_path / "other.npz", images=images, labels=labels)
    code, _, err = call(*train, "--data", tmp_path / "other.npz", "--out", tmp_path / "two")
    assert code == 2
    assert "budget of other images" in err
    assert not (tmp_path / "two").exists()


# ------------------------------------------------------------------------------------------- group size


def test_group_size_of_training(call, data, tmp_path) -> None:
    train = ["train", "--data", data, "--epsilon", 3, *SMALL, "--batch", 60]  # all records: ε in closed form
    assert call(*train, "--out", tmp_path / "three", "--group-size", 3)[0] == 0
    three = Ledger(Run(tmp_path / "three").ledger_path)
    assert 2.9 < three.epsilon() <= 3.0
    assert three.group_size == 3
    assert epsilon(three.mechanisms, 1e-3, group_size=3) == three.epsilon() > 3 * three.epsilon(group_size=1)
    assert "up to 3 images of one person" in (tmp_path / "three" / "release" / "PRIVACY.md").read_text()
    code, _, err = call(*train, "--out", tmp_path / "x", "--group-size", 0)
    assert code == 2
    assert "group_size" in err
    assert not (tmp_path / "x").exists()


# ---------------------------------------------------------------------------------------- release, verify


def test_release_and_verify(call, runs, tmp_path) -> None:
    code, out, _ = call("key", tmp_path / "k.pem")
    assert code == 0
    assert "fingerprint" in out
    code, out, _ = call("release", runs[0], tmp_path / "b.zip", "--samples", 6, "--sign", tmp_path / "k.pem", "-q")
    assert code == 0
    assert "signed by the key" in out
    code, out, _ = call("verify", tmp_path / "b.zip", "--public-key", tmp_path / "k.pem.pub", "--all-samples")
    assert code == 0
    assert "FAILED" not in out
    assert "The bundle is sound" in out
    assert "Not to be seen from a bundle" in out
    code, out, _ = call("verify", tmp_path / "b.zip", "--json")
    assert code == 0
    assert json.loads(out)["passed"] is True
    # What is unpacked is a generator.
    shutil.unpack_archive(tmp_path / "b.zip", tmp_path / "g")
    assert call("sample", tmp_path / "g", "-n", 3, "--out", tmp_path / "s.npz", "-q")[0] == 0


def test_a_bundle_is_sampled_and_says_where_it_is_not_enough(call, runs, tmp_path) -> None:
    call("release", runs[0], tmp_path / "b.zip", "-q")
    for source, out in ((runs[0], "run.npz"), (tmp_path / "b.zip", "bundle.npz")):
        code, _, err = call("sample", source, "-n", 4, "--seed", 1, "--out", tmp_path / out, "-q")
        assert code == 0, err
    drawn = [np.load(tmp_path / name)["images"] for name in ("run.npz", "bundle.npz")]
    assert np.array_equal(*drawn)
    for command in (("ledger",), ("doctor",), ("evaluate",)):
        code, _, err = call(*command, tmp_path / "b.zip")
        assert code == 2
        assert "is a bundle, which has no private half" in err
    (tmp_path / "bad.zip").write_bytes((tmp_path / "b.zip").read_bytes()[:-100])
    code, _, err = call("sample", tmp_path / "bad.zip", "--out", tmp_path / "s")
    assert code == 6
    assert "zip" in err.lower()


def test_classes_whose_names_have_commas_are_asked_for(call, tmp_path) -> None:
    images, labels = tiny_arrays()
    names = ["Glasses, sun", "none", 'a "b", c']
    settings = {**TINY_SETTINGS, "privacy": {"delta": 1e-3}}
    source = (images, labels, names)
    dpsyngen.train(source, epsilon=4, out=tmp_path / "r", settings=settings)
    for number, (asked, expected) in enumerate(
        [
            (["Glasses, sun"], [0, 0, 0]),
            (['"Glasses, sun", none'], [0, 1, 0]),
            (["none", 'a "b", c'], [1, 2, 1]),
            (["2,0"], [2, 0, 2]),
        ]
    ):
        options = [part for text in asked for part in ("--classes", text)]
        code, _, err = call("sample", tmp_path / "r", "-n", 3, "--out", tmp_path / f"{number}.npz", *options, "-q")
        assert code == 0, err
        assert np.load(tmp_path / f"{number}.npz")["labels"].tolist() == expected
    code, _, err = call(
        "sample", tmp_path / "r", "-n", 3, "--out", tmp_path / "x.npz", "--classes", "Glasses, sun,none"
    )
    assert code == 2
    assert "Quote a name that has a comma" in err


def test_bundle_that_was_changed(call, runs, tmp_path) -> None:
    call("release", runs[0], tmp_path / "b.zip", "-q")
    data = bytearray((tmp_path / "b.zip").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "b.zip").write_bytes(data)
    code, out, _ = call("verify", tmp_path / "b.zip")
    assert code == 6
    assert "FAILED" in out
    assert "NOT to be relied on" in out
    code, out, _ = call("verify", tmp_path / "b.zip", "--json")
    assert code == 6
    assert json.loads(out)["passed"] is False


def test_release_of_a_run_without_privacy(call, data, tmp_path) -> None:
    call("train", "--data", data, "--epsilon", "inf", "--out", tmp_path / "r", *SMALL)
    code, _, err = call("release", tmp_path / "r", tmp_path / "b.zip")
    assert code == 6
    assert "NOT PRIVATE" in err
    assert not (tmp_path / "b.zip").exists()
    assert not list((tmp_path / "r").glob("*/report.html"))
    code, out, _ = call("release", tmp_path / "r", tmp_path / "b.zip", "--not-private", "-q")
    assert code == 0
    assert "NOT PRIVATE" in out
    code, out, _ = call("verify", tmp_path / "b.zip")
    assert code == 6
    assert "NOT PRIVATE" in out
