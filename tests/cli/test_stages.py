"""`dpsyngen stages` as people use it: results, resuming, private images, and what is refused."""

from __future__ import annotations

import csv
import fcntl
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpsyngen.config import load_config
from dpsyngen.diffusion.prior import read_prior
from dpsyngen.privacy.budget import Budget
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.programs import make_program
from dpsyngen.thresholds.run import StagesOptions
from dpsyngen.training.plan import Shape, program_of

pytestmark = pytest.mark.slow

SMALL = [
    *("--network", "nano", "--steps", 3, "--seeds", 2, "--images", 8, "--spacing", 1.5),
    *("--set", "public.batch=4", "--set", "public.copies=1", "--set", "public.learning_rate=0.05"),
    *("--set", "stages.variant=both"),
]


def images_of(seed: int, n: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8), dtype=np.uint8)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """private.npz, proxy.npz, a program in leaves.yaml, and the folder for networks that all tests share."""
    folder = tmp_path_factory.mktemp("made")
    np.savez(folder / "private.npz", images=images_of(0), labels=np.arange(40) % 2)
    np.savez(folder / "proxy.npz", images=images_of(1))
    (folder / "leaves.yaml").write_text("program: {name: dead-leaves, seed: 3, params: {shape: disc}}\n")
    return folder


@pytest.fixture
def stages(call, made, tmp_path, monkeypatch):
    """Run the command with shared networks, a short bootstrap and moments of few images: (code, stdout, stderr)."""
    monkeypatch.setattr("dpsyngen.thresholds.run.StagesOptions", partial(StagesOptions, replicates=20))
    monkeypatch.setattr("dpsyngen.thresholds.denoisers._FOR_MOMENTS", 500)

    def run(*more: object, out: object = None, programs: object = "dead-leaves,contours"):
        where = tmp_path / "o" if out is None else out
        given = ["--networks", made / "networks", "--out", where, "--programs", programs]
        return call("stages", *given, *SMALL, *[str(m).format(made=made, tmp=tmp_path) for m in more])

    return run


PRIVATE = ("--data", "{made}/private.npz", "--epsilon", "1", "--delta", "1e-3")


def document(out: str) -> dict:
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


def test_all_results_with_a_proxy(stages, made, tmp_path) -> None:
    code, out, err = stages("--proxy", "{made}/proxy.npz", programs=f"dead-leaves,{made / 'leaves.yaml'}")
    assert code == 0, err
    folder = tmp_path / "o"
    assert "Thresholds in log σ" in out
    assert "leaves" in out
    assert "PUBLIC" in err
    assert "tier 0" in err
    # Everything in the folder is public, and nothing is half-written.
    assert not (folder / "private").exists()
    with Image.open(folder / "gap.png") as picture:
        assert picture.width > 800
    found = json.loads((folder / "gap.json").read_text())
    assert found["settings"]["programs"]["leaves"]["shape"] == "disc"
    assert found["settings"]["programs"]["leaves"]["seed"] == 3
    assert found["settings"]["seeds"] == [0, 1]
    assert found["versions"]["torch"]
    assert set(found["settings"]["networks"]) <= {p.name for p in (made / "networks").iterdir()}
    assert {(c["stand_in"], c["student"]) for c in found["curves"]} == {
        *(("programs", s) for s in ("dead-leaves", "leaves")),
        *(("wiener", s) for s in ("dead-leaves", "leaves")),
        *(("proxy", s) for s in ("dead-leaves", "leaves")),
    }
    assert found["stages"]["decided_by"] == "proxy"
    assert found["stages"]["student"] == "dead-leaves"
    assert len(found["elbows"]) == 6 * 2 * 2
    assert found["private"] is None
    with open(folder / "gap.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    levels = len(found["settings"]["log_sigma"])
    assert len(rows) == levels * 6 == levels * len(found["curves"])
    (curve,) = (c for c in found["curves"] if (c["stand_in"], c["student"]) == ("proxy", "dead-leaves"))
    written = [r for r in rows if (r["stand_in"], r["student"]) == ("proxy", "dead-leaves")]
    for m, row in enumerate(written):
        assert float(row["relative_gap_low"]) <= float(row["relative_gap"]) * 1.001
        assert float(row["excess_low"]) <= float(row["excess_high"])
        assert float(row["relative_gap"]) == pytest.approx(curve["relative_gap"][m], rel=1e-4)


def test_same_call_gives_the_same_figures(stages, tmp_path) -> None:
    for name in "ab":
        assert stages("-q", out=tmp_path / name)[0] == 0
    names = ("gap.csv", "gap.json", "gap.png", "stages.yaml", "settings.json")
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_what_is_found_is_what_train_takes(stages, made, tmp_path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("preset: cpu\nprivate: {steps: 77}\nstages: {networks: shared}\n")
    programs = f"{made / 'leaves.yaml'},contours"
    code, _, err = stages("--config", config, "--resolution", 8, programs=programs)
    assert code == 0, err
    text = (tmp_path / "o/stages.yaml").read_text()
    assert text.startswith("# Found by dpsyngen stages")
    loaded = load_config({}, file=tmp_path / "o/stages.yaml")
    assert (loaded.preset, loaded.private.steps, loaded.stages.networks) == ("cpu", 77, "shared")
    assert loaded.data.resolution == 8
    assert loaded.stages.variant == json.loads((tmp_path / "o/gap.json").read_text())["stages"]["variant"]
    program = program_of(loaded, Shape(8, 1, (), 10))
    assert program.config() == make_program("dead-leaves", resolution=8, channels=1, seed=3, shape="disc").config()


def test_without_a_prior_the_stages_are_those_of_the_paper(stages, tmp_path) -> None:
    code, _, err = stages("--proxy", "{made}/proxy.npz", "--set", "stages.variant=residual")
    assert code == 0, err
    assert "variant residual without a prior leaves programs no stage" in err, "--network leaves the prior out"
    found = json.loads((tmp_path / "o/gap.json").read_text())
    assert (found["stages"]["student"], found["settings"]["prior"]) == ("dead-leaves", None)
    assert load_config({}, file=tmp_path / "o/stages.yaml").stages.variant in ("both", "cleaning", "coarse", "dpdm")


@pytest.mark.parametrize("proxy", [(), ("--proxy", "{made}/proxy.npz")])
def test_with_dp_moments_prior_and_wiener_filter_are_held_against_networks_from_the_prior(
    stages, tmp_path, proxy
) -> None:
    more = ("--set", "stages.variant=residual", "--set", "network.prior=shipped")
    code, out, err = stages(*proxy, *more)
    assert code == 0, err
    found = json.loads((tmp_path / "o/gap.json").read_text())
    assert found["settings"]["prior"] == read_prior("shipped", 1).about["sha256"]
    by = "proxy" if proxy else "programs"
    assert {(c["stand_in"], c["student"]) for c in found["curves"]} == {
        *((by, student) for student in ("prior", "wiener")),
        *((("wiener", "prior"),) if proxy else ()),
    }
    assert (found["stages"]["student"], found["stages"]["variant"]) == ("prior", "residual")
    loaded = load_config({}, file=tmp_path / "o/stages.yaml")
    assert (loaded.stages.variant, loaded.network.prior) == ("residual", "shipped")
    for side, student in (("cleaning", "prior"), ("coarse", "wiener")):
        (row,) = (
            e
            for e in found["elbows"]
            if (e["side"], e["student"], e["stand_in"], e["method"]) == (side, student, by, "tolerance")
        )
        assert found["stages"][f"tau_{side}"] == row["log_sigma"]
    assert ("the prior, which programs trained, shown the proxy's moments: " in out) is bool(proxy)
    code, _, err = stages(
        "--proxy", "{made}/proxy.npz", *more[:2], "--set", "network.prior=none.safetensors", out=tmp_path / "p"
    )
    assert code == 2
    assert "which is no prior" in err
    assert not (tmp_path / "p").exists(), "refused before anything is trained"


def test_images_whose_moments_take_too_long_are_refused_before_anything_is_made(call, tmp_path) -> None:
    programs = ("--programs", "dead-leaves,contours", "--preset", "cpu-small", "--out", tmp_path / "o")
    code, _, err = call("stages", *programs, "--resolution", 64, "--set", "data.channels=rgb")
    assert code == 2
    assert "3 x 64 x 64 have 12,288 numbers" in err
    assert "--set stages.variant=both" in err
    assert not (tmp_path / "o").exists()


# ------------------------------------------------------------------------------------- going on


def test_busy_finished_and_foreign_folders_are_never_written_over(stages, tmp_path) -> None:
    (tmp_path / "o").mkdir()
    with open(tmp_path / "o/lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        code, _, err = stages()
    assert code == 2
    assert "another process is working on" in err
    assert stages("-q")[0] == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "o").iterdir() if p.is_file()}
    code, _, err = stages()
    assert code == 2
    assert "has results already" in err
    assert {p.name: p.read_bytes() for p in (tmp_path / "o").iterdir() if p.is_file()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    code, _, err = stages(out=tmp_path / "mine")
    assert code == 2
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    (tmp_path / "file").write_text("mine")
    assert stages(out=tmp_path / "file")[0] == 2


def test_interrupted_it_says_so_and_goes_on(stages, tmp_path, monkeypatch) -> None:
    import dpsyngen.thresholds.search as module

    networks = tmp_path / "n"

    def stops(*a, **k):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "measure", stops)
        code, out, _ = stages("--networks", networks, "--json")
    assert code == 130
    assert document(out)["error"]["kind"] == "interrupted"
    assert "the same command goes on" in document(out)["error"]["message"]
    assert len(list(networks.glob("*.safetensors"))) == 4
    # Other settings are another call.
    code, _, err = stages("--networks", networks, "--tolerance", 0.1)
    assert code == 2
    assert "begun with other settings (tolerance)" in err
    monkeypatch.setattr("dpsyngen.thresholds.denoisers.train_public", stops)  # all are there
    code, out, _ = stages("--networks", networks, "--json")
    assert code == 0
    assert Path(document(out)["files"][-1]).exists()


# ------------------------------------------------------------------------------------- private images


@pytest.fixture
def budget(tmp_path) -> Budget:
    return Budget.create(tmp_path / "budget", epsilon_limit=2.0, delta=1e-3)


def test_private_estimate_decides_and_is_counted(stages, made, budget, tmp_path) -> None:
    code, out, err = stages(*PRIVATE, "--budget", budget.path, "--json")
    assert code == 0, err
    found = document(out)
    folder = tmp_path / "o"
    ledger = Ledger(folder / "private/ledger.jsonl")
    assert found["private"] is True
    assert found["decided_by"] == "private"
    assert found["epsilon"] == ledger.epsilon() == Budget(budget.path).epsilon()
    assert found["delta"] == 1e-3
    about = json.loads((folder / "gap.json").read_text())
    assert about["private"]["records"] == 40
    assert about["settings"]["private"]["epsilon"] == 1.0
    # A training with the thresholds charges the same budget.
    loaded = load_config({"data": {"source": "x"}}, file=folder / "stages.yaml")
    assert loaded.privacy.budget == str(budget.path)
    assert loaded.privacy.epsilon == 1.0  # the default: what a training spends is for its user to say
    # Nothing of the images but the mechanism's output: neither their file nor a digest of them.
    from dpsyngen.data import load_images

    fingerprints = [load_images(made / "private.npz", labels=w).fingerprint() for w in (True, False)]
    for path in folder.iterdir():
        if path.is_file():
            text = path.read_bytes().decode("utf-8", "ignore")
            assert "private.npz" not in text
            assert not any(f in text for f in fingerprints)


def test_public_results_are_the_same_whatever_the_private_images_are(stages, made, tmp_path) -> None:
    """What is written besides the estimate does not depend on private images at all."""
    np.savez(tmp_path / "other.npz", images=images_of(7), labels=np.arange(40) % 2)
    curves = []
    for name in ("{made}/private.npz", "{tmp}/other.npz"):
        out = tmp_path / Path(name).stem
        code, said, err = stages("--data", name, *PRIVATE[2:], "--insecure-seed", 4, out=out)
        assert code == 0, err
        assert "NOT PRIVATE (reproducible noise)" in said
        assert "NOT PRIVATE" in err
        assert (out / "stages.yaml").read_text().startswith("# NOT PRIVATE")
        with open(out / "gap.csv", newline="") as f:
            curves.append([r for r in csv.DictReader(f) if r["stand_in"] != "private"])
    assert curves[0] == curves[1]


def test_killed_between_charge_and_result_it_is_charged_once(stages, budget, monkeypatch, tmp_path) -> None:
    from dpsyngen.thresholds.private import PrivateGap

    given = [*PRIVATE, "--budget", budget.path]
    with monkeypatch.context() as patch:
        patch.setattr(PrivateGap, "released", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        assert stages(*given)[0] == 130
    assert len(Ledger(tmp_path / "o/private/ledger.jsonl").mechanisms) == 1
    assert not (tmp_path / "o/gap.json").exists()
    assert stages(*given)[0] == 0
    assert len(Ledger(tmp_path / "o/private/ledger.jsonl").mechanisms) == 1
    assert len(Budget(budget.path).charges) == 1


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "{made}/private.npz"], "--epsilon is missing"),
        (["--epsilon", "1"], "--epsilon goes with --data"),
        (["--sampling-rate", "0.5", "--records", "9"], "--records, --sampling-rate goes with --data"),
        (["--set", "privacy.delta=1e-3"], "--set privacy.… goes with --data"),
        ([*PRIVATE], "--budget is missing"),
        ([*PRIVATE, "--budget", "{tmp}/none"], "cannot be read"),
        ([*PRIVATE[:3], "inf"], "belong to --proxy"),
        ([*PRIVATE, "--insecure-seed", "1", "--proxy", "{made}/private.npz"], "are the same images"),
        ([*PRIVATE, "--insecure-seed", "1", "--sampling-rate", "2"], "--sampling-rate is 2"),
        (["--proxy", "{made}/none"], "neither a file or folder nor a named set"),
        (["--proxy", "{made}/proxy.npz", "--images", "30"], "30 are set aside"),
        (["--images", "2"], "--images is 2"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--spacing", "9"], "--spacing is 9"),
        (["--tolerance", "0"], "--tolerance is 0"),
        (["--method", "eye"], "one of tolerance, loss"),
        (["--networks", __file__], "a folder, or one that is to be made"),
        (["--networks", f"{__file__}/x"], "is not a folder"),
        (["--resolution", "9"], "resolution"),
        (["--network", "enormous"], "network size"),
        (["--set", "public.steps=9"], "an option says 3 already"),
        (["--set", "stages.variant=gaussian"], "no stage that programs could own"),
        (["--programs", "dead-leaves"], "two programs or more"),
        (["--programs", ""], "two programs or more"),
        (["--programs", "dead-leaves,dead-leaves"], "a name of its own"),
        (["--programs", "dead-leaves,photographs"], "no program named 'photographs'"),
        (["--programs", "dead-leaves,{made}/none.yaml"], "cannot be read"),
        (["--programs", "dead-leaves,{tmp}/bad.yaml"], "must hold a program"),
        (["--programs", "dead-leaves,{tmp}/worse.yaml"], "colour"),
        (["--device", "abacus"], "must be auto or cpu"),
    ],
)
def test_refused_before_anything_is_made(stages, tmp_path, arguments, message, monkeypatch) -> None:
    monkeypatch.setattr("dpsyngen.thresholds.denoisers.train_public", lambda *a: pytest.fail("it trained"))
    (tmp_path / "bad.yaml").write_text("- dead-leaves\n")
    (tmp_path / "worse.yaml").write_text("{name: dead-leaves, params: {colour: red}}\n")
    code, _, err = stages(*arguments)
    assert code in (2, 3), err
    assert message in err
    assert not (tmp_path / "o").exists()


def test_budget_that_is_too_small_is_refused_before_anything_is_made(stages, tmp_path) -> None:
    small = Budget.create(tmp_path / "b", epsilon_limit=0.5, delta=1e-3)
    code, _, err = stages(*PRIVATE, "--budget", small.path)
    assert code == 3
    assert "above the budget" in err
    assert not (tmp_path / "o").exists()
    assert not Budget(small.path).charges


def test_shared_networks_are_those_of_the_same_settings_only(stages, made, tmp_path) -> None:
    copied = tmp_path / "n"
    shutil.copytree(made / "networks", copied) if (made / "networks").exists() else None
    assert stages("-q", "--networks", copied)[0] == 0
    count = len(list(copied.glob("*.safetensors")))
    assert stages("-q", "--networks", copied, "--set", "public.warmup=1", out=tmp_path / "p")[0] == 0
    assert len(list(copied.glob("*.safetensors"))) == count + 4
