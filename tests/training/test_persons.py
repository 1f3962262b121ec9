"""One record, one person: runs that know whose image is whose."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from dpsyngen import Generator
from dpsyngen.config import load_config
from dpsyngen.data import ImageDataset, load_images
from dpsyngen.errors import ConfigError, DataError, RunError
from dpsyngen.evaluation.run import check_memorisation, evaluate
from dpsyngen.fit import prepare
from dpsyngen.generator.guarantee import Guarantee
from dpsyngen.privacy.accounting import epsilon
from dpsyngen.privacy.budget import Budget
from dpsyngen.privacy.certificate import plain_words
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.release.bundle import pack
from dpsyngen.release.verify import verify
from dpsyngen.training.follower import _print
from dpsyngen.training.run import Run
from dpsyngen.training.session import chosen_images
from tests.conftest import TINY_SETTINGS, tiny_arrays
from tests.training.short_runs import begin, bytes_of, finish, merged, resume, start

NAMES = ("Ivanova-Planted", "Okonkwo-Planted", "Grünbaum-Planted")
COUNT = 60
# Every image in every step: then the noise for a group is known at once.  The last test has samples.
WHOLE = merged(TINY_SETTINGS, private={"batch": 38, "physical_batch": 20})  # 38 images are at most two of each person


def whose(i: int) -> str:
    """Five images of most, 15 of one person."""
    return NAMES[0] if i < 15 else f"{NAMES[1 + i % 2]}-{i // 5}-{i % 2}"


@pytest.fixture
def photos(tmp_path: Path) -> tuple[Path, Path]:
    """A folder of 60 images in three classes, and a table of persons."""
    images, labels = tiny_arrays(n=COUNT)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / "photos" / "abc"[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:02}.png")
    table = tmp_path / "patients.csv"
    rows = [f"{i:02}.png,{whose(i)}" for i in range(COUNT)]
    table.write_text("\n".join(["file_name,patient", *rows]) + "\n", encoding="utf-8")
    return tmp_path / "photos", table


def settings_file(path: Path, **sections: dict) -> Path:
    path.write_text(json.dumps(merged(TINY_SETTINGS, **sections)))
    return path


@pytest.mark.slow
def test_at_most_some_images_of_each_person_from_training_to_verify(call, photos, tmp_path, monkeypatch) -> None:
    """With names of persons planted: they are nowhere in what is written or printed."""
    folder, table = photos
    monkeypatch.chdir(tmp_path)
    config = settings_file(tmp_path / "c.yaml", private=WHOLE["private"])
    given = (
        "--config",
        config,
        "--data",
        "photos",
        "--epsilon",
        8,
        "--groups",
        "patients.csv",
        "--set",
        "data.cache=c",
    )
    asked = ("train", *given, "--most-per-person", 2, "--out", "run", "--delta", "1e-3", "--budget", "b.budget")
    Budget.create(Path("b.budget"), epsilon_limit=20, delta=1e-3)
    code, _, err = call(*asked)
    assert (code, "ake a budget with --group-size 2" in err, Path("run").exists()) == (2, True, False)
    Path("b.budget").unlink()
    Budget.create(Path("b.budget"), epsilon_limit=20, delta=1e-3, group_size=2)
    code, out, err = call(*asked)
    assert code == 0, err
    run = Run(tmp_path / "run")
    ledger = Ledger(run.ledger_path)
    used = load_images(folder, groups=table).images_a_person(2)[1]
    assert used < COUNT
    assert (ledger.records, ledger.group_size) == (used, 2)
    # DP moments and DP-SGD are accounted for two images together.
    assert epsilon(ledger.mechanisms, 1e-3, group_size=2) == ledger.epsilon() <= 8 < ledger.epsilon(group_size=3)
    c = Guarantee.read(run.release)
    assert (c.group_size, c.public_assumptions.records) == (2, used)
    assert "at most 2 images of each person were used, chosen at random" in str(c.people)
    assert "several images of one person" not in " ".join(c.not_covered)
    # Without one of a person's images another of theirs may be taken: the guarantee is for persons, not for images.
    assert (c.by_person, c.unit) == (True, "one person, with all of their images")
    assert c.adjacency.startswith("add or remove all images of a person, of which at most 2 are used;")
    words = (run.release / "PRIVACY.md").read_text()
    assert "at most 2 images of each person were used" in words
    assert ", for each person, with all of their images.**" in words
    assert "had all images of any one person never been used" in words
    for text in (words, (run.release / "README.md").read_text()):
        assert "knows everything about all images of a person and about all others" in text
    assert "any 2 images" not in words
    assert "more than ε = 20 at δ = 0.001 for each person." in words
    assert "for each person" in call("budget", "show", "b.budget")[1]
    assert "for one person, with all of their images (" in out + err
    assert "total for one person, with all of their images, added or removed" in call("ledger", "run")[1]
    code, _, refused = call("ledger", "run", "--group-size", 3)
    assert (code, "these runs protect persons" in refused) == (2, True)
    # A sum with a run that protects images would promise to persons what that run does not.
    images_alone = ("train", "--config", config, "--data", "photos", "--epsilon", 8)
    code, _, refused = call(*images_alone, "--out", "no", "--budget", "b.budget")
    assert (code, "they have no common ε" in refused) == (2, True)
    assert not Path("no").exists()
    assert call(*images_alone, "--out", "plain")[0] == 0
    code, _, refused = call("ledger", "run", "plain")
    assert (code, "some of the runs protect persons" in refused) == (2, True)
    pack(run, tmp_path / "b.zip")
    checked = verify(tmp_path / "b.zip")
    assert checked.passed, checked
    # The same images are found again, by the key, also where their path is given.
    assert check_memorisation(run, images=4).duplicates == 0
    assert check_memorisation(run, images=4, data=folder).duplicates == 0
    quick = {"images": 20, "metrics": ["frechet"], "classifiers": [], "bootstrap": 0}
    measured = evaluate(run, **quick)
    assert measured["protocol"]["real_train_images"] == used
    assert not any("trained on" in note for note in measured["notes"])
    for path in folder.rglob("*.png"):
        ImageOps.invert(Image.open(path)).save(path)
    with pytest.raises(DataError, match="not those that"):
        evaluate(run, **quick)
    with pytest.raises(DataError, match="not those that"):
        check_memorisation(run, images=4)
    privacy = run.release / "privacy.json"
    stated = json.loads(privacy.read_text())
    privacy.write_text(json.dumps(stated | {"by_person": False}))
    (run.release / "PRIVACY.md").write_text(plain_words(Guarantee.read(run.release)))
    pack(run, tmp_path / "c.zip")
    failed = [check for check in verify(tmp_path / "c.zip").checks if check.passed is False]
    assert "images of a person" in " ".join(check.text for check in failed)
    written = b"".join(bytes_of(tmp_path / "run").values()) + b"".join(bytes_of(tmp_path / "c").values())
    released = b"".join(bytes_of(run.release).values()) + (tmp_path / "b.zip").read_bytes()
    assert b"Planted" not in written + released + (out + err).encode()
    assert b"patients" not in released


def test_a_declared_number_is_checked(call, photos, tmp_path) -> None:
    folder, table = photos
    rows = [f"{i:02}.png,{NAMES[0]}-{i // 3}" for i in range(COUNT)]  # three images of each
    table.write_text("\n".join(["file_name,patient", *rows]) + "\n", encoding="utf-8")
    config = settings_file(tmp_path / "c.yaml", private={"steps": 2, "batch": COUNT})
    given = ("--data", folder, "--config", config, "--epsilon", 8, "--groups", table)
    code, _, err = call("train", *given, "--out", tmp_path / "a")
    assert code == 2
    assert "--group-size N" in err
    assert "--most-per-person m" in err
    code, _, err = call("train", *given, "--out", tmp_path / "a", "--group-size", 2)
    assert code == 2
    assert "somebody has more images than --group-size 2 says" in err
    assert "it is 3" in err
    assert "Planted" not in err
    assert not (tmp_path / "a").exists()
    assert call("train", *given, "--out", tmp_path / "a", "--group-size", 4)[0] == 0
    c = Guarantee.read(tmp_path / "a" / "release")
    assert c.group_size == 4
    assert str(c.people).startswith("declared: at most 4 images a person, checked against")
    assert c.public_assumptions.records == COUNT


def with_persons() -> ImageDataset:
    images, labels = tiny_arrays(n=COUNT)
    return load_images((images, labels)).with_persons([whose(i) for i in range(COUNT)])


def test_without_a_person_a_run_sees_no_more_than_that_many_images_less(tmp_path) -> None:
    data = with_persons()
    assert data.persons is not None
    privacy = {"epsilon": 8, "insecure_seed": 7, "most_per_person": 3, "delta": 1e-3}
    config = load_config(merged(WHOLE, privacy=privacy, data={"records": 50}, private={"batch": 50}))
    whole = start(config, data, tmp_path / "whole")
    without = start(config, data.subset(data.persons != 0), tmp_path / "without")
    seen, left = ({image.tobytes() for image in t.dataset.array()} for t in (whole, without))
    assert left < seen
    assert len(seen - left) == 3
    assert whole.plan == without.plan
    assert whole.ledger.group_size == 3


def test_a_resumed_run_has_the_same_images_and_no_others(tmp_path) -> None:
    data = with_persons()
    privacy = {"epsilon": 8, "insecure_seed": 7, "most_per_person": 2, "delta": 1e-3}
    config = load_config(merged(WHOLE, privacy=privacy))
    through = finish(start(config, data, tmp_path / "through"))
    stopped = start(config, data, tmp_path / "stopped")
    for number, _ in enumerate(stopped.steps()):
        stopped.stop_requested = number >= 8  # in the private phase
    assert not stopped.run.complete
    with pytest.raises(ConfigError, match="whose image each is"):
        resume(stopped.run, load_images(tiny_arrays(n=COUNT)))
    with pytest.raises(RunError, match="not those"):
        resume(stopped.run, data.with_persons([str(i // 3) for i in range(COUNT)]))
    again = finish(resume(stopped.run, data))
    assert again.dataset.fingerprint() == through.dataset.fingerprint() != data.fingerprint()
    weights = [{p.name: p.read_bytes() for p in t.run.release.rglob("*.safetensors")} for t in (again, through)]
    assert weights[0] == weights[1] != {}
    assert [e.details.get("people") is not None for e in again.ledger.entries].count(True) == 1
    other = begin(TINY_SETTINGS, tiny_arrays(n=COUNT), tmp_path / "other")
    assert other.dataset.persons is None


def test_fit_takes_a_person_for_each_image(tmp_path) -> None:
    images, labels = tiny_arrays(n=COUNT)
    options = {"epsilon": 8, "delta": 1e-3, "progress": False, "settings": TINY_SETTINGS}
    groups = np.array([whose(i) for i in range(COUNT)])
    g = Generator.fit(images, labels, groups=groups, most_per_person=1, out=tmp_path / "a", **options)
    assert g.privacy.group_size == 1
    assert "at most 1 image of each person was used" in str(g.privacy.people)
    assert "of which at most 1 is used" in g.privacy.adjacency
    with pytest.raises(ConfigError, match="was not said"):
        Generator.fit(images, labels, groups=groups, out=tmp_path / "b", **options)
    with pytest.raises(ConfigError, match="whose image each is"):
        Generator.fit(images, labels, most_per_person=2, out=tmp_path / "b", **options)


def test_runs_of_one_budget_may_choose_different_images(tmp_path) -> None:
    """The budget is of the data set, whatever was chosen of it."""
    budget = Budget.create(tmp_path / "budget", epsilon_limit=30.0, delta=1e-3, group_size=2)
    data = with_persons()
    privacy = {"epsilon": 4, "delta": 1e-3, "most_per_person": 2, "budget": str(budget.path)}
    config = load_config(merged(WHOLE, privacy=privacy))
    chosen = {start(config, data, tmp_path / name).dataset.fingerprint() for name in "ab"}
    assert len(chosen) == 2
    assert len(Budget(budget.path).charges) == 2


def test_processes_must_agree_on_whose_the_images_are() -> None:
    """Each process chooses the images of a run by itself."""
    data = with_persons()
    other = data.with_persons([whose(i) if i else "somebody" for i in range(COUNT)])
    assert data.fingerprint() == other.fingerprint()
    assert _print(data) == _print(with_persons()) != _print(other)
    config = load_config(merged(TINY_SETTINGS, privacy={"epsilon": 8, "most_per_person": 2}))
    with pytest.raises(ConfigError, match="whose image each is"):
        chosen_images(config, replace(data, persons=None), Randomness.from_insecure_seed(0))


@pytest.mark.slow
def test_tables_that_have_moved_are_given_when_a_run_is_resumed(call, photos, tmp_path) -> None:
    folder, table = photos
    labels = tmp_path / "labels.csv"
    rows = [f"{path.name},{path.parent.name}" for path in folder.rglob("*.png")]
    labels.write_text("\n".join(["file_name,label", *rows]) + "\n")
    privacy = {"epsilon": 8, "most_per_person": 2, "delta": 1e-3, "groups": str(table)}
    config = load_config(merged(TINY_SETTINGS, privacy=privacy, data={"source": str(folder), "labels": str(labels)}))
    training = prepare(config, tmp_path / "r")
    steps = training.steps()
    next(steps)
    steps.close()
    del training, steps
    moved = table.rename(tmp_path / "elsewhere.csv")
    code, _, err = call("train", "--resume", "--out", tmp_path / "r")
    assert code != 0
    assert "patients.csv" in err
    given = ("train", "--resume", "--out", tmp_path / "r", "--groups", moved, "--labels", tmp_path / "other.csv")
    labels.write_text(labels.read_text().replace("label", "class"))
    shutil.copy(labels, tmp_path / "other.csv")
    code, _, err = call(*given, "--unconditional")
    assert code == 2
    labels.write_text("file_name,label\n")
    code, _, err = call(*given)
    assert code == 0, err
    assert Run(tmp_path / "r").complete
    ledger = Ledger(Run(tmp_path / "r").ledger_path)
    assert epsilon(ledger.mechanisms, 1e-3, group_size=2) == ledger.epsilon() <= 8
