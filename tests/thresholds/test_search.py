"""Comparing public denoisers: which pairs on which images, and what the results say of known figures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dpsyngen.config import load_config, merge_settings
from dpsyngen.diffusion.samplers import to_float
from dpsyngen.errors import ConfigError, DataError
from dpsyngen.programs import make_program
from dpsyngen.thresholds.denoisers import Family, GivenImages, PublicDenoisers, split_proxy, wiener_filter
from dpsyngen.thresholds.gap import GapCurve, log_sigma_grid, seeded_noise
from dpsyngen.thresholds.search import (
    Measured,
    StageSearch,
    deciding,
    stand_in_elbows,
)
from dpsyngen.training.networks import make_denoiser, with_prior
from dpsyngen.training.plan import Shape
from dpsyngen.workers import Workers
from tests.thresholds.toys import ExactMixture

LEVELS = log_sigma_grid(1.5)


def family(label: str, program: str = "dead-leaves", **params: object) -> Family:
    return Family(label, make_program(program, resolution=8, channels=1, **params))


def images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 1, 8, 8), dtype=np.uint8)


def search(tmp_path, families, proxy=None, seeds: int = 2, count: int = 6, prior=None) -> StageSearch:
    base = {"network": {"size": "nano"}, "public": {"steps": 2, "batch": 2, "copies": 1}}
    reads = {"stages": {"variant": "residual"}, "network": {"prior": "shipped"}}
    config = load_config(merge_settings(base, reads if prior else {}))
    networks = PublicDenoisers(tmp_path, config, Shape(8, 1, (), 1), "cpu", Workers(1), prior)
    return StageSearch(families, proxy, networks, seeds=seeds, images=count, log_sigma=LEVELS)


class Constant:
    """A denoiser that answers one grey level: gaps and losses are known."""

    def __init__(self, level: float) -> None:
        self.level = level

    def __call__(self, x, sigma, labels=None):
        return 0 * x + self.level


def test_every_program_serves_every_other_and_the_proxy(tmp_path) -> None:
    proxy = split_proxy(images(20), 6)
    s = search(tmp_path, [family("a"), family("b", shape="disc"), family("c", "contours")], proxy, seeds=3)
    levels = {"a": 0.0, "b": 0.2, "c": 0.5, "proxy": -0.1}
    trained = {(label, seed): Constant(v + 0.01 * seed) for label, v in levels.items() for seed in range(3)}
    told = []
    m = s.measure(trained, lambda title, done, total, unit: told.append((title, done, total, unit)))
    kinds = {(c.teacher, c.student) for c in m.of("programs")}
    assert kinds == {(t, s_) for t in "abc" for s_ in "abc" if t != s_}
    assert {(c.teacher, c.student) for c in m.of("proxy")} == {("proxy", "a"), ("proxy", "b"), ("proxy", "c")}
    assert {(c.teacher, c.student) for c in m.of("wiener")} == {("wiener", s_) for s_ in "abc"}
    assert {c.student: len(c.gap) for c in m.of("floor")} == {"a": 3, "b": 3, "c": 3, "proxy": 3}
    for curve in m.of("programs") + m.of("proxy"):
        gap = (levels[curve.teacher] - levels[curve.student]) ** 2
        np.testing.assert_allclose(curve.gap, gap, rtol=1e-4)
        assert curve.gap.shape == (3, 6, len(LEVELS))
    for curve in m.of("floor"):
        wanted = np.array([0.01, 0.01, 0.02])[:, None, None] ** 2
        np.testing.assert_allclose(curve.gap, wanted + 0 * curve.gap, rtol=1e-3)
    # Losses are of the images that are set aside, and only those.
    x = proxy.held_out.reshape(6, -1) / 127.5 - 1
    (of_b,) = (c for c in m.of("proxy") if c.student == "b")
    np.testing.assert_allclose(of_b.student_loss[0, :, 0], np.square(x - 0.2).mean(1), rtol=1e-4)
    assert told[-1][1:] == (6, 6, "images")
    assert (s.student, s.teacher.label) == ("a", "proxy")


def test_the_prior_is_shown_the_moments_of_the_proxy(tmp_path) -> None:
    """Its loss is that of D = G + s F on the images set aside; it and the Wiener filter stand beside networks on the
    proxy alone, and every other family has nothing to say.
    """
    rng = np.random.default_rng(0)
    made = np.clip(128 + 60 * rng.standard_normal((40, 1, 1, 1)) + 20 * rng.standard_normal((40, 1, 8, 8)), 0, 255)
    proxy = split_proxy(made.astype(np.uint8), 6)
    s = search(tmp_path, [family("a"), family("b", "contours")], proxy, prior="0" * 64)
    assert [f.label for f in s.all_families] == ["proxy"]
    trained = {("proxy", seed): Constant(0.1 * seed) for seed in range(2)}
    m = s.measure(trained, lambda title, done, total, unit: None)
    (against,) = m.of("wiener")
    beside, filtered = m.of("proxy")
    assert [(c.teacher, c.student) for c in (against, beside, filtered)] == [
        ("wiener", "prior"),
        ("proxy", "prior"),
        ("proxy", "wiener"),
    ]
    assert not m.of("programs")
    assert (len(against.gap), len(beside.gap), len(filtered.gap)) == (1, 2, 2)
    filtering = wiener_filter(proxy.program.images)
    config = with_prior(s.networks.config)
    prior = make_denoiser(config, s.networks.shape, False, 0, filtering)
    x0 = to_float(torch.from_numpy(proxy.held_out))
    level = LEVELS[3]
    x = x0 + math.exp(level) * seeded_noise((1, 8, 8), 0)(slice(0, 6))
    with torch.no_grad():
        answers = [d(x, torch.full((6,), math.exp(level)), None) for d in (filtering, prior)]
    for curve, answer in ((against.teacher_loss, answers[0]), (against.student_loss, answers[1])):
        np.testing.assert_allclose(curve[0, :, 3], (answer - x0).square().flatten(1).mean(1), rtol=1e-4)
    np.testing.assert_allclose(beside.student_loss[1], against.student_loss[0], rtol=1e-5)
    np.testing.assert_allclose(filtered.student_loss[1], against.teacher_loss[0], rtol=1e-5)
    np.testing.assert_allclose(
        beside.teacher_loss[1], np.square(x0.numpy() - 0.1).mean((1, 2, 3))[:, None] + np.zeros(len(LEVELS)), rtol=1e-4
    )


def test_with_a_prior_networks_start_where_it_is(tmp_path, monkeypatch) -> None:
    """Without steps a network answers as the prior that is shown the moments of its own images: no gap at all."""
    s = search(tmp_path, [family("a"), family("b", "contours")], seeds=1, prior="0" * 64)
    monkeypatch.setattr("dpsyngen.thresholds.denoisers.train_public", lambda *_: iter(()))
    trained = s.train(lambda title, done, total, unit: None)
    assert list(trained) == [("a", 0), ("b", 0)]
    m = s.measure(trained, lambda title, done, total, unit: None)
    for curve in m.of("programs"):
        assert (curve.student == "prior") == (curve.gap.max() == 0)
    assert {(c.teacher, c.student) for c in m.of("programs")} == {(t, s_) for t in "ab" for s_ in ("prior", "wiener")}
    other = search(tmp_path, [family("a"), family("b", "contours")], seeds=1, prior="1" * 64)
    assert other.networks.path(family("a"), 0) != s.networks.path(family("a"), 0), "another prior, another network"
    asked = s.compared_on_private(trained)
    assert list(asked) == ["b", "prior"]
    x, sigma = torch.zeros(1, 1, 8, 8), torch.ones(1)
    assert torch.equal(asked["prior"](x, sigma), trained["b", 0](x, sigma))


def test_training_makes_each_network_once_and_measures_what_it_made(tmp_path) -> None:
    s = search(tmp_path, [family("a"), family("b", shape="disc")], seeds=1)
    told = []
    trained = s.train(lambda title, done, total, unit: told.append((title, done, total, unit)))
    assert list(trained) == [("a", 0), ("b", 0)]
    assert told[-1] == ("training on b, seed 0", 2, 2, "steps")
    m = s.measure(trained, lambda title, done, total, unit: None)
    assert len(m.of("programs")) == 2
    assert not m.of("floor")
    assert s.teacher.label == "b"
    assert m.clipping_norm > 0


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a"], "two programs or more"),
        ([], "two programs"),
        (["a", "a"], "name of its own"),
        (["a", "proxy"], "proxy"),
        (["a", "prior"], "prior"),
        (["a", "wiener"], "wiener"),
    ],
)
def test_families_that_cannot_be_compared(tmp_path, labels, message) -> None:
    with pytest.raises(ConfigError, match=message):
        search(tmp_path, [family(label) for label in labels])


def test_proxy_is_split_into_images_to_train_and_to_measure_on() -> None:
    values = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 8, 8), dtype=np.uint8)
    proxy = split_proxy(values, 5)
    assert isinstance(proxy.program, GivenImages)
    held, kept = set(proxy.held_out[:, 0, 0, 0].tolist()), set(proxy.program.images[:, 0, 0, 0].tolist())
    assert (len(held), len(kept)) == (5, 15)
    assert held | kept == set(range(20))
    np.testing.assert_array_equal(split_proxy(values, 5).held_out, proxy.held_out)
    with pytest.raises(DataError, match="20 images, but 11 are set aside"):
        split_proxy(values, 11)


# ---------------------------------------------------------------------------------------------- results


def curve(by: str, teacher: str, student: str, relative: np.ndarray, seeds: int = 2) -> GapCurve:
    loss = np.ones((seeds, 10, len(LEVELS)))
    return GapCurve(by, teacher, student, relative * loss, loss, (1 + relative) * loss)


def bump(low: float, high: float) -> np.ndarray:
    """5 % at `low` and `high`, more between them."""
    u = np.array(LEVELS)
    return 0.05 * np.exp(np.minimum(u - low, high - u))


def test_the_most_direct_stand_in_decides() -> None:
    m = Measured(np.array(LEVELS))
    m.curves += [curve("programs", "b", "a", bump(-4, 3)), curve("programs", "a", "b", bump(-5, 3))]
    found = stand_in_elbows(m, 0.05, 50)
    assert [(f.by, f.student) for f in found] == [("programs", "a"), ("programs", "b")]
    assert deciding(found, "a").elbows["cleaning", "tolerance"].log_sigma == pytest.approx(-4, abs=0.1)
    m.curves += [curve("proxy", "proxy", "a", bump(-2, 1)), curve("proxy", "proxy", "b", bump(-1, 1))]
    found = stand_in_elbows(m, 0.05, 50)
    assert deciding(found, "a").by == "proxy"
    assert deciding(found, "a").elbows["cleaning", "loss"].log_sigma == pytest.approx(-2, abs=0.3)
    u = np.array(LEVELS)
    squares = (v[None, None] for v in (bump(-3, 2), 1 + 0 * u, 1 + bump(-3, 2)))
    m.curves.append(GapCurve("private", "b", "a", *squares, 1e-4 + 0 * u))
    found = stand_in_elbows(m, 0.05, 50)
    decided = deciding(found, "a")
    assert decided.by == "private"
    elbow = decided.elbows["coarse", "tolerance"]
    assert elbow.log_sigma == pytest.approx(2, abs=0.1)
    assert 0 < elbow.high - elbow.low < 0.05
    assert deciding(found, "b").by == "proxy"
    m.curves.append(curve("wiener", "wiener", "a", bump(-5, 5)))
    assert deciding(stand_in_elbows(m, 0.05, 50), "a").by == "private"


def test_average_is_over_all_that_stand_in() -> None:
    m = Measured(np.array(LEVELS))
    m.curves += [curve("programs", "b", "a", bump(-4, 3)), curve("programs", "c", "a", 3 * bump(-4, 3))]
    (found,) = stand_in_elbows(m, 0.05, 200)
    np.testing.assert_allclose(found.mean.relative.curve, 2 * bump(-4, 3))
    low, high = found.mean.relative.band()
    assert (low < found.mean.relative.curve).all()
    assert (high > found.mean.relative.curve).all()
    assert found.mean.excess.band()[0] == pytest.approx(low)
    (alone,) = stand_in_elbows(m, 0.05, 0)
    np.testing.assert_array_equal(alone.mean.relative.band()[0], alone.mean.relative.curve)


def test_optimal_denoisers_of_gaussians_come_out_as_their_closed_form(tmp_path) -> None:
    """The whole way from images to the relative gap, with exact denoisers in the place of networks."""
    from tests.thresholds.toys import gaussian_gap, gaussian_loss

    rng = np.random.default_rng(0)
    # Pixels are independent: 128 ± 30 in the proxy; the program's images do not matter here.
    values = (128 + 30 * rng.standard_normal((900, 1, 8, 8))).clip(0, 255).astype(np.uint8)
    proxy = split_proxy(values, 400)
    s = search(tmp_path, [family("a")], proxy, seeds=1, count=400)
    x = values / 127.5 - 1
    own = ExactMixture.gaussian(np.full(64, x.mean()).tolist(), (np.eye(64) * x.var()).tolist())
    other = ExactMixture.gaussian(np.full(64, 0.1).tolist(), (np.eye(64) * 0.02).tolist())
    m = s.measure({("a", 0): other, ("proxy", 0): own}, lambda title, done, total, unit: None)
    relative = m.of("proxy")[0].relative()[0]
    for k, u in enumerate(LEVELS):
        exact = gaussian_gap(own, other, math.exp(u)) / gaussian_loss(own, math.exp(u))
        assert relative[k] == pytest.approx(exact, rel=0.05)
