"""``Generator.fit`` and what a user does with the result."""

from __future__ import annotations

import json
import math
import shutil
import stat
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dpsyngen
from dpsyngen import Generator
from dpsyngen.config import ComputeConfig
from dpsyngen.errors import ConfigError, DataError, ReleaseError, RunError
from dpsyngen.privacy.certificate import Certificate
from dpsyngen.training.run import place_of
from tests.conftest import TINY_SETTINGS, tiny_arrays

pytestmark = pytest.mark.slow

NAMES = np.array(["cat", "dog", "<b>cow</b>"])


def fit(out: Path, **options: Any) -> Generator:
    images, labels = tiny_arrays()
    given = {"epsilon": 4.0, "settings": TINY_SETTINGS, "out": out, "progress": False} | options
    return Generator.fit(images, NAMES[labels], **given)


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    return fit(tmp_path_factory.mktemp("fitted") / "run")


@pytest.fixture(scope="module")
def bundle(generator: Generator) -> Path:
    assert generator.place.run is not None
    return generator.save(generator.place.run.parent / "cats.zip")


# ---------------------------------------------------------------------------------------------------- fit


def test_fit_is_a_whole_run_with_ledger_and_certificate(generator) -> None:
    run = dpsyngen.Run(generator.place.run)
    certificate = Certificate.read(run.release / "privacy.json")
    assert run.complete
    assert certificate.private
    assert run.finished_ledger().epsilon() == certificate.epsilon <= 4.0
    assert generator.class_names == ("<b>cow</b>", "cat", "dog")
    assert (run.private / "health.json").exists()


def test_fit_without_out_makes_a_new_folder_each_time(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    name = "fit-20260101-120000"
    with place_of(None, name) as first, place_of(None, name) as second:
        assert [str(first), str(second)] == ["runs/fit-20260101-120000", "runs/fit-20260101-120000-2"]
        (first / "run.json").touch()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [first.name]  # nothing was made in the other


def test_two_fits_have_different_noise(generator, tmp_path) -> None:
    """A seed that is the same in two fits would show as equal weights."""
    other = fit(tmp_path / "run")
    a, b = (torch.cat([p.flatten() for p in g.networks["context"].parameters()]) for g in (generator, other))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("kind", ["array", "tensor", "channels last", "float", "list of pictures"])
def test_images_may_come_in_many_forms(kind, tmp_path, monkeypatch) -> None:
    from PIL import Image

    from dpsyngen.config import load_config
    from dpsyngen.data.load import as_source

    images, labels = tiny_arrays(n=12)
    forms = {
        "array": images,
        "tensor": torch.from_numpy(images).requires_grad_(False),
        "channels last": images[..., None],
        "float": images / 255,
        "list of pictures": [Image.fromarray(i) for i in images],
    }
    config = load_config(TINY_SETTINGS)
    from dpsyngen.data.load import load_private

    dataset = load_private(as_source(forms[kind], list(labels), None), config)
    assert np.array_equal(dataset.images[:, 0], images)
    assert np.array_equal(dataset.labels, labels)


def test_class_names_name_the_labels_and_need_not_all_occur() -> None:
    from dpsyngen.data.load import as_source, load_images

    images, labels = tiny_arrays(n=12)
    dataset = load_images(as_source(images, labels, ["a", "b", "c", "never"]))
    assert dataset.class_names == ("a", "b", "c", "never")
    assert np.array_equal(dataset.labels, labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"varient": "both"}, "Did you mean variant"),
        ({"seed": 1}, "the noise has no seed"),
        ({"settings": [1]}, "must be a mapping"),
        ({"settings": {"privat": {"steps": 2}}}, "did you mean private"),
        ({"epsilon": -1}, "epsilon"),
        ({"class_names": ["a"]}, "3 class|labels"),
        ({"preset": "none"}, "preset"),
    ],
)
def test_mistakes_are_refused_before_anything_is_made(options, message, tmp_path) -> None:
    with pytest.raises((ConfigError, DataError, TypeError), match=message):
        fit(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_labels_go_with_arrays_only(tmp_path) -> None:
    with pytest.raises(ConfigError, match="labels and class_names go with arrays"):
        Generator.fit("digits", [1], epsilon=1, out=tmp_path / "run")
    with pytest.raises(ConfigError, match="no images were given"):
        Generator.fit("", epsilon=1, out=tmp_path / "run")


def test_fit_overwrites_nothing(generator) -> None:
    with pytest.raises(RunError, match="exists already"):
        fit(generator.place.run)


def test_options_go_before_settings_and_reach_the_certificate(tmp_path) -> None:
    images, _ = tiny_arrays()
    g = Generator.fit(
        images,
        epsilon=2.0,
        delta=1e-3,
        group_size=2,
        variant="gaussian",
        settings=TINY_SETTINGS | {"privacy": {"epsilon": 9.0}},
        out=tmp_path / "run",
        progress=False,
    )
    assert g.privacy.epsilon <= 2.0
    assert (g.privacy.delta, g.privacy.group_size) == (1e-3, 2)
    assert g.class_names == ()
    assert "up to 2 images together" in repr(g.privacy)
    assert g.sample(2).labels is None
    with pytest.raises(ConfigError, match="no classes"):
        g.sample(2, labels=0)


# ------------------------------------------------------------------------------------------------ progress


def test_what_fit_prints_holds_nothing_private(tmp_path, capsys) -> None:
    """The loss on private images, and findings that rest on it, would stay in a notebook that is shared."""
    g = fit(tmp_path / "run", progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "run directory" in err
    assert "context" in err
    losses = [
        json.loads(line)["loss"] for line in (g.place.run / "private" / "training.jsonl").read_text().splitlines()
    ]
    assert losses
    for loss in losses:
        assert f"{loss:.3f}" not in err
    for finding in json.loads((g.place.run / "private" / "health.json").read_text())["findings"]:
        assert (finding["seen"] in err) == (finding["basis"] == "released" and finding["severity"] != "note")


def test_a_long_reading_is_told_unless_the_number_of_images_is_private(tmp_path, capsys, monkeypatch) -> None:
    from PIL import Image

    from dpsyngen.training.log import Display

    monkeypatch.setattr(Display, "patience", 0.0)
    images, _ = tiny_arrays(n=40)
    for i, pixels in enumerate(images):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    settings = TINY_SETTINGS | {"stages": {"variant": "gaussian"}}
    told = []
    for name, records in (("found", None), ("declared", 50)):
        data = {"data": {"records": records}}
        Generator.fit(tmp_path / "photos", epsilon=9, settings=settings | data, out=tmp_path / name)
        told.append(capsys.readouterr().err)
    assert "reading images: 40 images" in told[0]
    assert "50 images" in told[1]
    assert "40 images" not in told[1]


def test_progress_false_is_silent(tmp_path, capsys) -> None:
    fit(tmp_path / "run", progress=False)
    assert capsys.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------ interrupts


def stop_after(monkeypatch, step: int, politely: bool) -> None:
    """Interrupt at a step, as a notebook does: once, or (politely false) so that the step is not finished."""
    import os
    import signal

    from dpsyngen.training import pipeline

    original = pipeline.train_private

    def interrupted(*arguments: Any, **options: Any):
        for progress in original(*arguments, **options):
            if progress.step == step:
                if not politely:
                    raise KeyboardInterrupt
                os.kill(os.getpid(), signal.SIGINT)
            yield progress

    monkeypatch.setattr(pipeline, "train_private", interrupted)


@pytest.mark.parametrize("politely", [True, False])
def test_an_interrupted_fit_goes_on_to_the_same_generator(politely, tmp_path, monkeypatch) -> None:
    settings = TINY_SETTINGS | {"privacy": {"insecure_seed": 5}}
    whole = fit(tmp_path / "whole", settings=settings)
    with monkeypatch.context() as patch:
        stop_after(patch, 3, politely)
        with pytest.raises(KeyboardInterrupt, match=r"Generator\.resume\(.*run"):
            fit(tmp_path / "run", settings=settings)
    images, labels = tiny_arrays()
    with pytest.raises(RunError, match="not those"):
        Generator.resume(tmp_path / "run", images[::-1], NAMES[labels], progress=False)
    with pytest.raises(ConfigError, match="arrays"):
        Generator.resume(tmp_path / "run", progress=False)
    with pytest.raises(RunError, match="not finished"):
        Generator.load(tmp_path / "run")
    resumed = Generator.resume(tmp_path / "run", images, NAMES[labels], progress=False)
    assert np.array_equal(resumed.sample(6).images, whole.sample(6).images)
    assert resumed.privacy.epsilon == whole.privacy.epsilon
    with pytest.raises(RunError, match=r"nothing to resume.*Generator\.load"):
        Generator.resume(tmp_path / "run")


def test_fit_works_outside_the_main_thread(tmp_path) -> None:
    """Where signals cannot be handled."""
    from threading import Thread

    done: list[Generator] = []
    thread = Thread(target=lambda: done.append(fit(tmp_path / "run", variant="gaussian")))
    thread.start()
    thread.join()
    assert done[0].privacy.private


def test_an_error_in_the_middle_says_where_the_run_is(tmp_path, monkeypatch) -> None:
    from dpsyngen.training import pipeline

    def broken(*arguments: Any, **options: Any):
        raise MemoryError("no more")

    monkeypatch.setattr(pipeline, "train_private", broken)
    with pytest.raises(MemoryError) as caught:
        fit(tmp_path / "run")
    assert f"Generator.resume({str(tmp_path / 'run')!r}, images, labels)" in caught.value.__notes__[0]


# ------------------------------------------------------------------------------------------------- sample


def test_labels_are_names_or_numbers_for_all_images_or_each(generator) -> None:
    assert generator.sample(3, "dog").labels.tolist() == [2, 2, 2]
    assert generator.sample(3, 2).labels.tolist() == [2, 2, 2]
    assert generator.sample(labels=["dog", "cat"]).labels.tolist() == [2, 1]
    assert generator.sample(2, np.array([0, 1])).labels.tolist() == [0, 1]
    assert generator.sample(2, ["cat", 2]).labels.tolist() == [1, 2]
    assert generator.sample(4).labels.tolist() == [0, 1, 2, 0]
    assert generator.sample(2, classes=["dog"]).labels.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((), {}, "number of images is missing"),
        ((0,), {}, "must be a whole number and at least 1"),
        ((2.5,), {}, "must be a whole number and at least 1"),
        ((), {"labels": "cat"}, "number of images is missing"),
        ((3, ["cat"]), {}, "1 labels were given for 3 images"),
        ((1, "mouse"), {}, "there is no class 'mouse'"),
        ((1, 3), {}, "there is no class 3"),
        ((1, -1), {}, "there is no class -1"),
        ((1, [0.5]), {}, "names or whole numbers"),
        ((1, [[0]]), {}, "one class for all images or a list"),
        ((), {"labels": []}, "one class for all images or a list"),
        ((1, 0), {"classes": [1]}, "labels and classes were both given"),
    ],
)
def test_mistakes_in_sampling_are_refused(generator, arguments, options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        generator.sample(*arguments, **options)


def test_an_option_that_sampling_does_not_have_is_pythons_own_error(generator) -> None:
    for draw in (generator.sample, generator.trajectory):
        with pytest.raises(TypeError, match="guidence"):
            draw(1, guidence=2)


def test_the_seed_of_sampling_is_public_and_repeats(generator) -> None:
    assert np.array_equal(generator.sample(3).images, generator.sample(5).images[:3])
    assert not np.array_equal(generator.sample(3).images, generator.sample(3, seed=1).images)
    drawn = generator.sample(3, seed=None)
    assert not np.array_equal(drawn.images, generator.sample(3, seed=None).images)
    again = generator.sample(3, seed=drawn.settings["seed"])
    assert np.array_equal(drawn.images, again.images)


def test_numbers_that_are_also_names_of_other_classes_are_refused(tmp_path) -> None:
    """Labels 1, 2, 3 make classes called '1', '2', '3', which are numbers 0, 1, 2."""
    images, labels = tiny_arrays()
    g = Generator.fit(
        images, labels + 1, epsilon=4, variant="gaussian", settings=TINY_SETTINGS, out=tmp_path / "r", progress=False
    )
    assert g.class_names == ("1", "2", "3")
    with pytest.raises(ConfigError, match="could be the one called '1'"):
        g.sample(2, labels=1)
    with pytest.raises(ConfigError, match="could be the one called '1'"):
        g.sample(labels=[1, 2])
    with pytest.raises(ConfigError, match="could be the one called '1'"):
        g.sample(2, classes=[1])
    assert g.sample(labels=np.array([0, 2])).labels.tolist() == [0, 2]  # as Samples.labels are
    assert g.sample(1, labels="1").labels.tolist() == [0]


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
    p, c = generator.privacy, Certificate.read(generator.place.release / "privacy.json")
    assert p.certificate == c
    assert (p.epsilon, p.delta, p.unit, p.records, p.group_size) == (c.epsilon, c.delta, "one image", 60, 1)
    assert p.assumptions.class_names == ["<b>cow</b>", "cat", "dog"]
    assert p.mechanisms == tuple(c.mechanisms)
    assert p.recompute() <= p.epsilon * (1 + 1e-6)
    assert p.recompute("rdp") >= p.recompute()
    assert p.plain_words() == (generator.place.release / "PRIVACY.md").read_text()
    text = repr(p)
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


# ------------------------------------------------------------------------------------------- what it shows


def test_repr_says_what_it_is(generator) -> None:
    text = repr(generator)
    for part in ("1x8x8", "'cat'", "context (DP-SGD)", "ε = ", str(generator.place.run), f"{generator.parameters:,}"):
        assert part in text
    assert generator.parameters > 0


def test_class_names_are_escaped_in_html(generator) -> None:
    for page in (generator._repr_html_(), generator.privacy._repr_html_(), generator.sample(6)._repr_html_()):
        assert "cow" in page
        assert "<b>" not in page


def test_get_params_gives_settings_that_fit_takes_again(generator, tmp_path) -> None:
    flat, nested = generator.get_params(), generator.get_params(deep=False)
    assert flat["private__steps"] == nested["private"]["steps"] == TINY_SETTINGS["private"]["steps"]
    assert "data__source" not in flat
    again = fit(tmp_path / "run", settings=nested)
    assert again.get_params() == flat


def test_the_private_half_of_a_fit_is_closed_to_others(generator) -> None:
    assert stat.S_IMODE((generator.place.run / "private").stat().st_mode) == 0o700


def test_processes_of_torchrun_must_be_given_one_run_directory(monkeypatch) -> None:
    """Each would choose another one."""
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="out is missing"), place_of(None, "fit"):
        pass


@pytest.mark.parametrize("module", ["config", "generator.classes", "generator.samples"])
def test_examples_in_docstrings_are_true(module) -> None:
    import doctest
    from importlib import import_module

    result = doctest.testmod(import_module(f"dpsyngen.{module}"))
    assert result.attempted
    assert not result.failed


def test_drawing_computes_as_it_is_asked_to(generator: Generator) -> None:
    plain = Generator(generator.place.release)
    other = Generator(generator.place.release, compute=ComputeConfig(channels_last=True))
    weights = [m.weight for m in other.networks["context"].modules() if isinstance(m, torch.nn.Conv2d)]
    assert any(w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in weights)
    a, b = (g.sample(6, seed=1).images.astype(int) for g in (plain, other))
    assert abs(a - b).max() <= 1
    with pytest.raises(ConfigError, match="tf32"):
        Generator(generator.place.release, compute=ComputeConfig(precision="tf32"))
