"""``Generator.fit`` and what a user does with the result."""

from __future__ import annotations

import json
import stat
from typing import Any

import numpy as np
import pytest
import torch

import dpsyngen
from dpsyngen import Generator
from dpsyngen.config import ComputeConfig
from dpsyngen.errors import ConfigError, DataError, RunError
from dpsyngen.generator.guarantee import Guarantee
from dpsyngen.training.run import place_of
from tests.conftest import TINY_SETTINGS, tiny_arrays
from tests.generator.conftest import NAMES, fit

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("generators")]  # fitted once

# ---------------------------------------------------------------------------------------------------- fit


def test_fit_is_a_whole_run_with_ledger_and_certificate(generator) -> None:
    run = dpsyngen.Run(generator.place.run)
    certificate = Guarantee.read(run.release)
    assert run.complete
    assert certificate.private
    assert run.finished_ledger().epsilon() == certificate.epsilon <= 4.0
    assert generator.class_names == ("<b>cow</b>", "cat", "dog")
    assert (run.private / "health.json").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"resolution": 16}, "data.resolution is 16, but must be 8,"),
        ({"channels": "rgb"}, "data.channels is 'rgb'.*grey,"),
    ],
)
def test_a_data_set_is_trained_on_in_the_form_that_it_has(asked, message, tmp_path) -> None:
    settings = TINY_SETTINGS | {"data": asked}
    with pytest.raises(ConfigError, match=message):
        dpsyngen.train(dpsyngen.load_images(tiny_arrays()), epsilon=4, out=tmp_path / "r", settings=settings)
    assert not (tmp_path / "r").exists()


def test_out_may_begin_with_the_home_folder_and_idle_settings_are_told(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    settings = {"stages": {"variant": "gaussian"}}
    run = dpsyngen.train(tiny_arrays(), epsilon=4.0, out="~/a", settings=settings)
    assert run.path == tmp_path / "a"
    assert not (tmp_path / "~").exists()
    fit("~/b", settings=settings, steps=5, progress=True)
    assert "variant gaussian looks at no private.steps" in capsys.readouterr().err
    fit("~/c", settings=Generator.load("~/b").get_params(deep=False), progress=True)  # all are given
    assert "looks at no" not in capsys.readouterr().err


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
        ({"epsilon": None}, "epsilon is None, but must be a number above 0"),
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
    with pytest.raises(ConfigError, match="guidance is 3, but this generator has no classes"):
        g.sample(2, guidance=3)
    assert g.sample(2, guidance=1).settings["guidance"] == 1


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
