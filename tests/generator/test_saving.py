"""What a generator is saved as, loads from and says of its privacy."""

from __future__ import annotations

import json
import math
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

import dpsyngen
from dpsyngen import Generator
from dpsyngen.errors import ConfigError, ReleaseError, RunError
from dpsyngen.generator.guarantee import Guarantee
from dpsyngen.privacy.certificate import Certificate
from tests.generator.conftest import fit

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("generators")]  # fitted once

# --------------------------------------------------------------------------------------------- save and load


def test_a_generator_loads_from_run_release_and_bundle(generator, bundle, tmp_path) -> None:
    folder = generator.save(tmp_path / "deep" / "release")
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    expected = generator.sample(3).images
    run = generator.place.run
    for place in (run, str(run), run / "release", folder, moved, bundle):
        g = Generator.load(place)
        assert np.array_equal(g.sample(3).images, expected)
        assert g.privacy == generator.privacy
    assert Generator.load(run / "release").place.run == run
    assert Generator(folder).place.run is None


def test_what_is_saved_holds_nothing_of_the_private_half(generator, bundle, tmp_path) -> None:
    folder = generator.save(tmp_path / "release")
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    with zipfile.ZipFile(bundle) as archive:
        packed = set(archive.namelist())
    assert {"generator.json", "privacy.json", "PRIVACY.md", "config.yaml", "weights/context.safetensors"} <= files
    assert files - packed == set()
    private = {p.name for p in (generator.place.run / "private").iterdir()} - {"config.yaml", "report.html"}
    assert "ledger.jsonl" in private
    assert not {Path(f).name for f in files} & private
    assert "source" not in (folder / "config.yaml").read_text()


def test_a_saved_bundle_verifies_and_is_saved_again_byte_for_byte(bundle, tmp_path) -> None:
    assert dpsyngen.verify(bundle).passed
    copy = Generator.load(bundle).save(tmp_path / "copy.zip")
    assert copy.read_bytes() == bundle.read_bytes()


def test_saving_overwrites_nothing(generator, tmp_path) -> None:
    (tmp_path / "a.zip").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        generator.save(tmp_path / "a.zip")
    with pytest.raises(RunError, match="exists already"):
        generator.save(tmp_path / "folder")
    assert (tmp_path / "a.zip").read_text() == "mine"
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["mine"]


def test_a_bundle_needs_the_run_directory(generator, tmp_path) -> None:
    alone = Generator.load(generator.save(tmp_path / "release"))
    with pytest.raises(ConfigError, match="made from a run directory"):
        alone.save(tmp_path / "a.zip")


def test_a_changed_bundle_is_not_loaded(bundle, tmp_path) -> None:
    from dpsyngen.release.bundle import write_zip

    with zipfile.ZipFile(bundle) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    changed = [(n, c.replace(b'"epsilon": ', b'"epsilon":  ') if n == "privacy.json" else c) for n, c in members]
    write_zip(tmp_path / "changed.zip", changed)
    with pytest.raises(ReleaseError, match="not what its manifest says"):
        Generator.load(tmp_path / "changed.zip")
    write_zip(tmp_path / "less.zip", [m for m in members if m[0] != "manifest.json"])
    with pytest.raises(ReleaseError, match=r"it has no manifest\.json"):
        Generator.load(tmp_path / "less.zip")
    write_zip(tmp_path / "more.zip", [*members, ("more", b"")])
    with pytest.raises(ReleaseError, match="do not agree on"):
        Generator.load(tmp_path / "more.zip")


def test_loading_something_else_is_an_error_that_helps(tmp_path) -> None:
    with pytest.raises(RunError, match="does not exist"):
        Generator.load(tmp_path / "nothing")
    with pytest.raises(RunError, match="not a run directory"):
        Generator.load(tmp_path)
    (tmp_path / "a.pt").write_text("")
    with pytest.raises(RunError, match="not a generator"):
        Generator.load(tmp_path / "a.pt")


def test_a_link_in_a_release_is_not_followed(generator, tmp_path) -> None:
    folder = generator.save(tmp_path / "release")
    (tmp_path / "secret").write_text("secret")
    (folder / "report.html").unlink(missing_ok=True)
    (folder / "report.html").symlink_to(tmp_path / "secret")
    with pytest.raises(ReleaseError, match="plain files only"):
        Generator.load(folder).save(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


# ------------------------------------------------------------------------------------------------- privacy


def test_privacy_is_what_the_certificate_states(generator) -> None:
    p, stated = generator.privacy, (generator.place.release / "privacy.json").read_text()
    c = Certificate.from_json(stated, "privacy.json")
    assert p == Guarantee.read(generator.place.release)
    assert p.certificate.to_dict() == c.to_dict() == json.loads(stated)
    assert (p.epsilon, p.delta, p.unit, p.records, p.group_size) == (c.epsilon, c.delta, "one image", 60, 1)
    assert p.assumptions.class_names == ["<b>cow</b>", "cat", "dog"]
    assert p.mechanisms == c.mechanisms != []
    assert p.recompute() <= p.epsilon * (1 + 1e-6)
    assert p.recompute("rdp") >= p.recompute()
    assert p.plain_words() == (generator.place.release / "PRIVACY.md").read_text()
    text = repr(p)
    assert text == str(p)
    assert text.startswith("ε = ")
    assert "60 records" in text
    assert "NOT PRIVATE" not in text


def test_a_generator_that_is_not_private_says_so_everywhere(tmp_path) -> None:
    g = fit(tmp_path / "run", epsilon=math.inf, variant="dpdm")
    samples = g.sample(2)
    assert not g.privacy.private
    assert g.privacy.epsilon == math.inf
    for text in (
        repr(g),
        g._repr_html_(),
        repr(g.privacy),
        g.privacy._repr_html_(),
        repr(samples),
        samples._repr_html_(),
    ):
        assert "NOT PRIVATE" in text
    with pytest.raises(ReleaseError, match="NOT PRIVATE"):
        g.save(tmp_path / "a.zip")
    assert g.save(tmp_path / "a.zip", not_private=True).exists()
    assert "NOT PRIVATE" in repr(Generator.load(tmp_path / "a.zip"))


def test_a_certificate_that_is_missing_or_contradicts_is_no_guarantee(generator, tmp_path) -> None:
    g = Generator.load(generator.save(tmp_path / "release"))
    path = tmp_path / "release" / "generator.json"
    path.write_text(path.read_text().replace('"private": true', '"private": false'))
    other = Generator.load(tmp_path / "release")
    with pytest.raises(ReleaseError, match="contradict"):
        _ = other.privacy
    assert "UNKNOWN, so NOT PRIVATE" in repr(other)
    (tmp_path / "release" / "privacy.json").unlink()
    with pytest.raises(ReleaseError, match="missing"):
        _ = g.privacy
    assert "UNKNOWN, so NOT PRIVATE" in repr(g)
