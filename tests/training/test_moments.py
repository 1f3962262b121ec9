"""DP moments: what the queries see of one record, what they cost, and what becomes of them with and without noise."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dpsyngen.data import ImageDataset
from dpsyngen.diffusion.gaussian import ClassGaussians, GaussianDenoiser
from dpsyngen.diffusion.standalone import cosine_matrix, each_axis
from dpsyngen.distributed import ALONE
from dpsyngen.errors import ConfigError
from dpsyngen.privacy.accounting import Mechanism, epsilon
from dpsyngen.privacy.moments import VectorSum
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.training import moments
from dpsyngen.training.moments import estimate_moments, scatter_frequencies
from dpsyngen.training.plan import MomentsPlan, plan_moments
from dpsyngen.training.spectra import Frequencies

KEY = Randomness.from_insecure_seed(0)


def dataset(images: np.ndarray, labels: np.ndarray | None) -> ImageDataset:
    names = () if labels is None else tuple("abcdefghij"[: int(labels.max()) + 1])
    return ImageDataset(images, labels, names, "test")


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    """8×8 handwritten digits, ten classes."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    grey = np.clip(np.round(images * 255 / 16), 0, 255).astype(np.uint8).reshape(-1, 1, 8, 8)
    return dataset(grey, labels.astype(np.int64))


def estimate(data: ImageDataset, z: float, *, key: Randomness = KEY, rank: int = 20, **options) -> ClassGaussians:
    plan = plan_moments(z, data.num_classes)
    return estimate_moments(data, data.num_classes, len(data), plan, key, rank=rank, **options)


def dense(g: ClassGaussians) -> Tensor:
    """[K, D, D]."""
    g = ClassGaussians(*(t.double() for t in g.to_tensors().values()))
    size, s = len(g.basis), math.isqrt(len(g.basis))
    c, s = (1, s) if s * s == size else (3, math.isqrt(size // 3))
    textures = each_axis(g.rest.sqrt().diag(), [cosine_matrix(n) for n in (c, s, s)])
    outside = torch.eye(size).double() - g.basis @ g.basis.T
    return g.basis @ g.covariances @ g.basis.T + outside @ (textures * g.spectrum) @ textures.mT @ outside


def rows_of(data: ImageDataset) -> Tensor:
    return torch.from_numpy(data.images.reshape(len(data), -1)).double() / 127.5 - 1


# -------------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize("classes", [0, 1, 2, 10])
def test_queries_together_cost_as_much_as_one_mechanism(classes) -> None:
    plan = plan_moments(1.7, classes)
    queries = plan.mechanisms()
    assert len(queries) == (3 if classes > 1 else 2)
    assert sum(1 / m.noise_multiplier**2 for m in queries) == pytest.approx(1 / 1.7**2)
    assert all(m.sampling_rate == 1 and m.count == 1 for m in queries)
    assert epsilon(queries, 1e-5) == pytest.approx(epsilon([Mechanism(1.0, 1.7)], 1e-5), rel=2e-3)


def test_without_noise_no_query_has_any() -> None:
    assert plan_moments(0.0, 10) == MomentsPlan(0.0, 0.0, 0.0)
    assert plan_moments(0.0, 0) == MomentsPlan(0.0, 0.0, None)
    with pytest.raises(ConfigError, match="noise multiplier"):
        plan_moments(-1.0, 3)


@pytest.mark.parametrize(("z", "records", "size"), [(5.9, 60_000, 784), (26.0, 60_000, 784), (3.0, 50_000, 3072)])
def test_number_of_frequencies_is_the_least_that_the_rule_allows(z, records, size) -> None:
    m = scatter_frequencies(z, records, size)
    harmonic = sum(1 / j for j in range(1, size + 1))

    def showing(m: int) -> float:
        """j* of the docs, with R = 1: where 0.6 / (j H_D) meets the edge of the noise."""
        return 0.6 / harmonic / (z / records * math.sqrt(2 * m))

    assert 64 < m < size
    assert m >= 8 * showing(m)
    assert m - 1 < 8 * showing(m - 1)


def test_number_of_frequencies_is_clamped() -> None:
    assert scatter_frequencies(0.0, 10, 784) == 784
    assert scatter_frequencies(0.0, 10, 12_288) == 4096
    assert scatter_frequencies(1e-9, 60_000, 12_288) == 4096
    assert scatter_frequencies(1e9, 10, 784) == 64
    assert scatter_frequencies(1e9, 10, 49) == 49


# ------------------------------------------------------------------------------------------------ the mechanism


class Released:
    """Stands in for the mechanism: remembers what was asked and answers the same whatever the images."""

    def __init__(self) -> None:
        self.sums: list[VectorSum] = []
        self.asked: list[tuple[float, int]] = []

    def __call__(self, total: VectorSum, noise_multiplier: float, randomness: Randomness, step: int) -> Tensor:
        self.sums.append(total)
        self.asked.append((noise_multiplier, step))
        g = torch.Generator().manual_seed(step)
        noise = torch.randn(total.sums.shape, generator=g, dtype=torch.float64) * total.noise_std(noise_multiplier)
        if step == 0:
            noise[:, -1] += 40  # numbers of records
        return noise / 1000 - 1e4 if step == 1 else noise + 5  # no variance, so that the third query clips


EXTREME = [
    np.zeros((1, 6, 6)),
    np.full((1, 6, 6), 255),
    np.indices((6, 6)).sum(0)[None] % 2 * 255,
    np.arange(36).reshape(1, 6, 6) * 7,
]


@pytest.mark.parametrize("labelled", [True, False])
def test_queries_move_by_no_more_than_their_sensitivity(monkeypatch, labelled) -> None:
    """Given the same answers to the earlier queries, adding one image moves each by at most its Δ."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 1, 6, 6), dtype=np.uint8)
    labels = np.arange(30) % 3 if labelled else None
    base = dataset(images, labels)
    largest = [0.0, 0.0, 0.0]
    for extra in EXTREME:
        for label in (0, 2):
            more = dataset(
                np.concatenate([images[:7], extra[None].astype(np.uint8), images[7:]]),
                np.concatenate([labels[:7], [label], labels[7:]]) if labelled else None,
            )
            calls = []
            for data in (base, more):
                calls.append(Released())
                monkeypatch.setattr(moments, "released", calls[-1])
                plan = plan_moments(3.0, data.num_classes)
                # The declared number of records is public and the same for both.
                estimate_moments(data, data.num_classes, 30, plan, KEY, rank=5)
            for i, (a, b) in enumerate(zip(calls[0].sums, calls[1].sums, strict=True)):
                assert a.l2_sensitivity == b.l2_sensitivity
                moved = float(((a.values - b.values) * a.weights).norm()) / a.l2_sensitivity
                assert moved <= 1
                largest[i] = max(largest[i], moved)
            assert calls[0].asked == [(m.noise_multiplier, step) for step, m in enumerate(plan.mechanisms())]
    assert min(largest[: 3 if labelled else 2]) > 0.99  # and the bounds are met


def test_sensitivities_of_the_queries(monkeypatch) -> None:
    mechanism = Released()
    monkeypatch.setattr(moments, "released", mechanism)
    rng = np.random.default_rng(0)
    data = dataset(rng.integers(0, 256, (30, 3, 4, 4), dtype=np.uint8), np.arange(30) % 2)
    result = estimate_moments(data, 2, 30, plan_moments(1.0, 2), KEY, rank=7)
    d = result.basis.shape[1]
    bounds = [math.sqrt(48 + 48 / 16), 48 / 4, 1.44 * d]
    assert [s.l2_sensitivity for s in mechanism.sums] == pytest.approx(bounds)


def test_the_result_depends_on_the_images_through_the_mechanism_alone(monkeypatch) -> None:
    rng = np.random.default_rng(0)
    sets = [
        dataset(rng.integers(0, 256, (40, 1, 6, 6), dtype=np.uint8), np.arange(40) % 3),
        dataset(np.zeros((55, 1, 6, 6), dtype=np.uint8), np.append(np.zeros(54, dtype=np.int64), 2)),
    ]
    results = []
    for data in sets:
        monkeypatch.setattr(moments, "released", Released())
        results.append(estimate_moments(data, 3, 40, plan_moments(2.0, 3), KEY, rank=8).to_tensors())
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


def test_the_same_key_gives_the_same_moments(digits) -> None:
    first, again, other = (estimate(digits, 2.0, key=Randomness.from_insecure_seed(s)) for s in (0, 0, 1))
    for name, tensor in first.to_tensors().items():
        assert torch.equal(tensor, again.to_tensors()[name])
    assert not torch.equal(first.means, other.means)
    assert not torch.equal(first.frequencies, other.frequencies)


def test_the_size_of_the_batches_does_not_matter(digits, monkeypatch) -> None:
    whole = estimate(digits, 2.0)
    monkeypatch.setattr(moments, "_NUMBERS_A_BATCH", 64 * 100)
    pieces = estimate(digits, 2.0)
    torch.testing.assert_close(dense(pieces), dense(whole), rtol=0, atol=1e-4)
    assert torch.equal(pieces.means, whole.means)


# -------------------------------------------------------------------------------------------------- without noise


def crafted(channels: int = 1) -> tuple[ImageDataset, int]:
    """Two classes whose residuals are sums of ±a_j e_j, every combination equally often: nothing is clipped."""
    side, directions = 6, 4
    signs = np.array(np.meshgrid(*[[-1, 1]] * directions)).reshape(directions, -1).T  # [16, 4]
    rng = np.random.default_rng(0)
    pixels = rng.permutation(channels * side * side)[: directions * 3].reshape(directions, 3)
    residual = np.zeros((16, channels * side * side))
    for j, (where, size) in enumerate(zip(pixels, (60, 40, 30, 20), strict=True)):
        residual[:, where] = (signs[:, j] * size)[:, None]
    images, labels = [], []
    for label, (mean, scale, times) in enumerate([(120, 1.1, 3), (140, 0.9, 3)]):
        images.append(np.tile(mean + residual * scale, (times, 1)))
        labels.append(np.full(16 * times, label))
    stacked = np.concatenate(images)
    assert np.allclose(stacked, stacked.round())
    order = rng.permutation(len(stacked))
    data = dataset(
        stacked[order].round().astype(np.uint8).reshape(-1, channels, side, side), np.concatenate(labels)[order]
    )
    return data, directions


@pytest.mark.parametrize("channels", [1, 3])
def test_without_noise_the_moments_are_those_of_the_images(channels) -> None:
    data, directions = crafted(channels)
    got = estimate(data, 0.0, rank=directions)
    assert got.basis.shape[1] == directions
    rows, labels = rows_of(data), torch.from_numpy(data.labels)
    torch.testing.assert_close(got.frequencies, torch.tensor([0.5, 0.5]))
    for c in range(2):
        part = rows[labels == c]
        mean = part.mean(0)
        torch.testing.assert_close(got.means[c].double(), mean, rtol=0, atol=1e-5)
        covariance = (part - mean).T @ (part - mean) / len(part)
        # The variance outside the directions has a floor.
        torch.testing.assert_close(dense(got)[c], covariance, rtol=0, atol=2e-4)


def test_without_noise_or_labels_there_is_one_gaussian() -> None:
    data, directions = crafted()
    alone = replace(data, labels=None, class_names=())
    rows = rows_of(data)
    covariance = (rows - rows.mean(0)).T @ (rows - rows.mean(0)) / len(rows)
    # One more direction: between the classes.
    for got in (
        estimate(alone, 0.0, rank=directions + 1),
        estimate_moments(data, 0, len(data), plan_moments(0.0, 0), KEY, rank=directions + 1),
    ):
        assert len(got.means) == 1
        assert got.frequencies.tolist() == [1.0]
        torch.testing.assert_close(got.means[0].double(), rows.mean(0), rtol=0, atol=1e-5)
        torch.testing.assert_close(dense(got)[0], covariance, rtol=0, atol=2e-4)


def test_directions_that_are_not_kept_go_to_the_pixels(digits) -> None:
    rows, labels = rows_of(digits), torch.from_numpy(digits.labels)
    got = estimate(digits, 0.0, rank=6)
    means = torch.stack([rows[labels == c].mean(0) for c in range(10)])
    residual = rows - means[labels]
    residual = residual * (4 / residual.norm(dim=1, keepdim=True)).clamp_max(1)  # R = √64 / 2
    basis = got.basis.double()
    outside = torch.eye(64).double() - basis @ basis.T
    left = residual @ outside
    texture = outside @ dense(got)[0] @ outside
    assert float(texture.trace()) == pytest.approx(float(left.square().sum(1).mean()), rel=0.02)
    # Each ring of frequencies has what it has in the images.
    f = Frequencies((1, 8, 8))
    energies = f.transform(f.transform(texture).mT).diagonal(), f.transform(left).square().mean(0)
    of_ring, wanted = (f.rings.mean(x) * f.rings.number for x in energies)
    torch.testing.assert_close(of_ring, wanted, rtol=0.15, atol=0.02)
    # Where the digits never vary (their left edge) there is hardly any.
    still = rows.std(0) < 0.02
    assert int(still.sum()) >= 3
    assert float(got.rest[still].max()) < 0.25 * float(got.rest.mean())


def test_directions_that_fill_the_space_leave_nothing_to_the_pixels() -> None:
    """Where every direction is kept, a leftover of rounding must not be divided by a share of nothing."""
    images = np.random.default_rng(0).integers(0, 256, (4000, 1, 4, 4), dtype=np.uint8)
    got = estimate(dataset(images, np.arange(4000) % 2), 0.0, rank=16)
    assert got.basis.shape == (16, 16)
    assert float(got.spectrum.max()) < 1e-3


def test_energy_of_the_frequencies_that_are_left_out_is_not_lost(digits, monkeypatch) -> None:
    whole = estimate(digits, 0.0, rank=5)
    monkeypatch.setattr(moments, "scatter_frequencies", lambda z, records, size: 10)
    part = estimate(digits, 0.0, rank=5)
    traces = [dense(g).diagonal(dim1=1, dim2=2).sum(1) @ g.frequencies.double() for g in (whole, part)]
    assert float(traces[1]) == pytest.approx(float(traces[0]), rel=0.05)


def test_variances_are_never_zero() -> None:
    flat = dataset(np.full((20, 1, 4, 4), 77, dtype=np.uint8), np.arange(20) % 2)
    got = estimate(flat, 0.0)
    assert float(got.spectrum.min()) >= 0.99e-5
    assert float(got.rest.min()) >= 0.099
    assert float(got.covariances.diagonal(dim1=1, dim2=2).min()) > 1e-8
    torch.testing.assert_close(got.means, torch.full((2, 16), 77 / 127.5 - 1), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ with noise


def test_means_under_noise_are_better_than_the_noisy_sums(digits) -> None:
    rows, labels = rows_of(digits), torch.from_numpy(digits.labels)
    truth = torch.stack([rows[labels == c].mean(0) for c in range(10)])
    for z, at_most in ((0.5, 0.95), (4.0, 0.5)):
        raw = (z / math.sqrt(0.2) * 8 * math.sqrt(1 + 1 / 16) / 179.7) ** 2  # variance of the noise in sum over number
        error = float((estimate(digits, z).means.double() - truth).square().mean())
        assert error < at_most * raw
    spread = float((truth - truth.mean(0)).square().mean())
    assert error < 1.1 * spread  # hardly worse than giving every class the mean of all


def test_noise_that_hides_everything_leaves_something_sane(digits) -> None:
    few = digits.subset(np.arange(12))
    plan = plan_moments(200.0, 10)
    for seed in range(3):
        got = estimate_moments(few, 10, 12, plan, Randomness.from_insecure_seed(seed), rank=20)
        assert bool((got.means.abs() <= 1).all())
        assert bool((got.frequencies > 0).all())
        size = got.covariances.shape[1]
        pooled = got.covariances.mean(0)
        for covariance in got.covariances:  # shapes of classes do not show, so all have that of the pooled one
            scale = covariance.diagonal().mean() / pooled.diagonal().mean()
            torch.testing.assert_close(covariance, pooled * scale, rtol=1e-3, atol=1e-3 * float(pooled.max()))
        # Nor does the energy, which ends where it was expected: 0.6 R², R² = 64/4.
        assert float(dense(got)[0].trace()) == pytest.approx(0.6 * 16, rel=0.1)
        x = GaussianDenoiser(got, (1, 8, 8)).draw(torch.arange(10), 1.0, torch.zeros(10, 1, 8, 8))
        assert torch.isfinite(x).all()
        assert 1 <= size <= 20


def test_more_noise_denoises_worse_but_beats_no_knowledge(digits) -> None:
    x0 = rows_of(digits).view(-1, 1, 8, 8).float()
    g = torch.Generator().manual_seed(0)
    sigma = torch.full((len(x0),), 0.8)
    noisy = x0 + 0.8 * torch.randn(x0.shape, generator=g)
    labels = torch.from_numpy(digits.labels)
    errors = [
        float((GaussianDenoiser(estimate(digits, z, rank=64), (1, 8, 8))(noisy, sigma, labels) - x0).square().mean())
        for z in (0.0, 0.5, 5.0)
    ]
    ignorant = float((noisy / (1 + 0.64 * 3) - x0).square().mean())  # the uniform prior on [-1, 1], σ_d² = 1/3
    assert errors == sorted(errors)
    assert errors[-1] < 0.9 * ignorant


def test_shapes_of_classes_that_do_not_show_are_not_invented(digits) -> None:
    got = estimate_moments(digits, 10, 1797, MomentsPlan(0.5, 0.5, 300.0), KEY, rank=20)
    assert got.covariances.shape[1] > 5
    pooled = got.covariances.mean(0)
    for covariance in got.covariances:
        scale = covariance.diagonal().mean() / pooled.diagonal().mean()
        torch.testing.assert_close(covariance, pooled * scale, rtol=1e-3, atol=1e-3 * float(pooled.max()))


def test_means_of_classes_gain_by_the_directions_in_which_images_vary() -> None:
    """Thirty classes that differ as their images do: what query 2 finds tells their means from the noise."""
    rng, classes, labels = np.random.default_rng(0), 30, np.arange(6000) % 30
    patterns = np.linalg.qr(rng.normal(size=(256, 4)))[0]
    rows = (rng.normal(size=(classes, 4))[labels] + rng.normal(size=(6000, 4))) @ patterns.T
    images = np.clip(np.round((rows + 1) * 127.5), 0, 255).astype(np.uint8).reshape(-1, 1, 16, 16)
    data = ImageDataset(images, labels, tuple(f"{k}" for k in range(classes)), "test")
    truth = torch.stack([rows_of(data)[labels == k].mean(0) for k in range(classes)])
    plan = plan_moments(1.0, classes)
    rough = moments._class_sums(
        moments._Images(data, True, lambda: False, ALONE), classes, 6000, plan.mean, KEY
    ).means()
    got = estimate_moments(data, classes, 6000, plan, KEY, rank=20)
    error, before = ((m.double() - truth).square().sum() for m in (got.means, rough))
    assert float(error) < 0.6 * float(before)


def test_noise_that_looks_like_a_direction_stays_within_what_images_can_have() -> None:
    """However large the noise, the bounds on clipped images hold."""
    rng = np.random.default_rng(0)
    data = dataset(rng.integers(0, 256, (5, 1, 4, 4), dtype=np.uint8), np.arange(5) % 2)
    norm = 16 / 4  # R²
    for seed in range(200):
        got = estimate_moments(data, 0, 5, plan_moments(100.0, 0), Randomness.from_insecure_seed(seed), rank=9)
        assert float(dense(got).diagonal(dim1=1, dim2=2).sum(1).max()) <= norm * 1.01
        plan = MomentsPlan(0.1, 0.0, 1e4)
        got = estimate_moments(data, 2, 5, plan, Randomness.from_insecure_seed(seed), rank=9)
        assert bool((got.covariances.diagonal(dim1=1, dim2=2).sum(1) <= norm / got.frequencies * 1.01).all())


def test_variances_are_not_raised_by_the_noise(digits) -> None:
    alone = replace(digits, labels=None, class_names=())

    def largest(z: float, seed: int) -> Tensor:
        plan = MomentsPlan(0.0, z, None)
        found = estimate_moments(alone, 0, 1797, plan, Randomness.from_insecure_seed(seed), rank=3)
        return found.covariances[0].diagonal()

    z = 15.0
    edge = 16 * z / 1797 * math.sqrt(2 * 64)
    exact = largest(0.0, 0).double()[0]
    mean = torch.stack([largest(z, seed) for seed in range(8)]).double()[:, 0].mean()
    raised = edge**2 / 4 / exact  # what noise adds to an eigenvalue
    assert raised > 0.1 * exact
    assert 0.5 * float(exact) < float(mean) < float(exact + 0.5 * raised)  # what is not sure goes to the texture


def test_noise_in_the_numbers_of_classes_does_not_make_them_brighter() -> None:
    """All classes alike and bright: the noise of a number moves its class along the mean of all, and must be known."""
    data = dataset(np.full((1000, 1, 4, 4), 230, dtype=np.uint8), np.arange(1000) % 10)
    z, kept = 1.0, 0.0
    for seed in range(6):
        means = estimate(data, z, key=Randomness.from_insecure_seed(seed)).means.double()
        kept += float((means - means.mean(0)).mean(1).square().mean())
    sums = (z / math.sqrt(0.2)) ** 2 * (1 + 1 / 16)  # variance of the noise of a pixel's sum is 16 times that
    raw = 6 * sums * (1 + 16 * (230 / 127.5 - 1) ** 2) / 100**2
    assert kept < 0.2 * raw


def test_an_empty_data_set_is_legal_and_private() -> None:
    """Removing the only image must not be seen otherwise than through noise."""
    empty = ImageDataset(np.zeros((0, 1, 4, 4), dtype=np.uint8), np.zeros(0, dtype=np.int64), ("a", "b"), "test")
    got = estimate_moments(empty, 2, 1, plan_moments(1.0, 2), KEY, rank=4)
    assert bool((got.means.abs() <= 1).all())


def test_means_are_smoothed_by_frequency_and_not_by_pixel(digits) -> None:
    """Noise is white and digits are not: the finest frequencies of the means are all but removed."""
    got = estimate(digits, 4.0)
    coefficients = Frequencies((1, 8, 8)).transform(got.means)
    assert float(coefficients[:, 32:].square().mean()) < 0.1 * float(coefficients[:, :8].square().mean())


@pytest.mark.parametrize(
    ("classes", "plan_for", "records", "rank", "words"),
    [
        (10, 0, 10, 5, "plan"),
        (0, 10, 10, 5, "plan"),
        (4, 4, 10, 5, "4 classes"),
        (10, 10, 0, 5, "records"),
        (10, 10, 10, 0, "rank"),
    ],
)
def test_wrong_arguments_are_refused(digits, classes, plan_for, records, rank, words) -> None:
    with pytest.raises(ConfigError, match=words):
        estimate_moments(digits, classes, records, plan_moments(1.0, plan_for), KEY, rank=rank)
