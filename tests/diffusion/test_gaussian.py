"""The Wiener denoiser against the formulas written out with dense matrices, in fp64."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from scipy.fft import dctn
from torch import Tensor

from dpsyngen.diffusion.gaussian import ClassGaussians, GaussianDenoiser
from dpsyngen.errors import ConfigError

SHAPE = (1, 3, 4)
SIZE = 12
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def example(k: int = 3, d: int = 4, size: int = SIZE, seed: int = 0, equal_rest: bool = False) -> ClassGaussians:
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    basis = torch.linalg.qr(randn(size, d))[0]
    basis[:, ::2] *= -1  # not the signs that another such decomposition would give
    a = randn(k, d, d)
    rest = torch.full((size,), 0.07).double() if equal_rest else randn(size).square() * 0.1 + 0.01
    spectrum = torch.ones(size).double() if equal_rest else randn(size).square()
    frequencies = torch.rand(k, generator=g, dtype=torch.float64) + 0.1
    return ClassGaussians(randn(k, size) * 0.4, basis, a @ a.mT / d, rest, spectrum, frequencies / frequencies.sum())


def dense(g: ClassGaussians, shape=SHAPE) -> Tensor:
    """[K, D, D]: the definition of Σ_c."""
    outside = torch.eye(g.basis.shape[0], dtype=torch.float64) - g.basis @ g.basis.T
    return g.basis @ g.covariances @ g.basis.T + outside @ texture(g, shape) @ outside


def texture(g: ClassGaussians, shape) -> Tensor:
    """√ψ Fᵀ diag(q) F √ψ, with SciPy's F."""
    f = dctn(np.eye(math.prod(shape)).reshape(-1, *shape), axes=(1, 2, 3), norm="ortho")
    f = torch.from_numpy(f.reshape(len(f), -1)).mT  # column i: the transform of pixel i
    root = g.rest.sqrt().diag()
    return root @ f.mT @ g.spectrum.diag() @ f @ root


def exact(g: ClassGaussians, shape=SHAPE) -> GaussianDenoiser:
    return GaussianDenoiser(g, shape, dtype=torch.float64)


def batch(n: int, seed: int = 1, shape=SHAPE) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    sigma = torch.logspace(-2.5, 1.9, n, dtype=torch.float64)[torch.randperm(n, generator=gen)]
    return torch.randn(n, *shape, generator=gen, dtype=torch.float64) * (1 + sigma.view(-1, 1, 1, 1)), sigma


MODELS = [
    pytest.param(example(), id="pixels"),
    pytest.param(example(equal_rest=True), id="equal"),
    pytest.param(example(k=1), id="one-class"),
    pytest.param(example(d=1), id="one-direction"),
    pytest.param(example(d=SIZE), id="all-directions"),
    pytest.param(example(d=SIZE - 1), id="one-outside"),
    pytest.param(example(d=SIZE, equal_rest=True), id="all-directions-equal"),
    pytest.param(replace(example(), rest=torch.zeros(SIZE).double()), id="nothing-outside"),
]


@pytest.mark.parametrize("model", MODELS)
def test_filter_of_each_class_in_one_mixed_batch(model) -> None:
    x, sigma = batch(40)
    labels = torch.arange(40) % len(model.means)
    out = exact(model)(x, sigma, labels)
    for i in range(40):
        cov, mean = dense(model)[labels[i]], model.means[labels[i]]
        wiener = cov @ torch.linalg.inv(cov + sigma[i] ** 2 * torch.eye(SIZE).double())
        torch.testing.assert_close(out[i].flatten(), mean + wiener @ (x[i].flatten() - mean), **CLOSE)


@pytest.mark.parametrize("model", MODELS)
def test_unknown_class_is_the_posterior_mean_of_the_mixture(model) -> None:
    x, sigma = batch(20)
    denoiser = exact(model)
    out = denoiser(x, sigma)
    k, eye = len(model.means), torch.eye(SIZE).double()
    for i in range(20):
        flat = x[i].flatten()
        noisy = dense(model) + sigma[i] ** 2 * eye
        log_density = torch.stack(
            [torch.distributions.MultivariateNormal(model.means[c], noisy[c]).log_prob(flat) for c in range(k)]
        )
        weight = torch.softmax(log_density + model.frequencies.log(), 0)
        means = [
            model.means[c] + dense(model)[c] @ torch.linalg.solve(noisy[c], flat - model.means[c]) for c in range(k)
        ]
        torch.testing.assert_close(out[i].flatten(), weight @ torch.stack(means), rtol=1e-6, atol=1e-6)
    labels = torch.full((20,), k)
    assert torch.equal(denoiser(x, sigma, labels), out)


def test_labels_of_known_and_unknown_classes_in_one_batch() -> None:
    denoiser = exact(example())
    x, sigma = batch(9)
    labels = torch.tensor([0, 3, 1, 3, 2, 0, 3, 1, 2])
    mixed = denoiser(x, sigma, labels)
    for i in range(9):
        torch.testing.assert_close(mixed[i : i + 1], denoiser(x[i : i + 1], sigma[i : i + 1], labels[i : i + 1]))
    assert not torch.allclose(mixed[1], denoiser(x, sigma, torch.zeros(9).long())[1])


def test_posterior_mean_by_quadrature() -> None:
    """One pixel, two classes: E[x₀ | x] by summing over x₀ itself."""
    model = ClassGaussians(
        torch.tensor([[-0.8], [0.6]]).double(),
        torch.ones(1, 1).double(),
        torch.tensor([[[0.09]], [[0.01]]]).double(),
        torch.zeros(1).double(),
        torch.ones(1).double(),
        torch.tensor([0.3, 0.7]).double(),
    )
    x0 = torch.linspace(-6, 6, 200_001, dtype=torch.float64)
    prior = sum(
        f * torch.distributions.Normal(m, v**0.5).log_prob(x0).exp()
        for f, m, v in [(0.3, -0.8, 0.09), (0.7, 0.6, 0.01)]
    )
    for sigma in (0.05, 0.4, 3.0):
        for x in (-1.5, -0.3, 0.1, 0.9):
            weight = prior * torch.exp(-((x - x0) ** 2) / (2 * sigma**2))
            got = exact(model, (1, 1, 1))(torch.full((1, 1, 1, 1), x).double(), torch.tensor([sigma]).double())
            assert float(got) == pytest.approx(float((weight * x0).sum() / weight.sum()), abs=1e-6)


def test_limits_of_the_noise_level() -> None:
    model = example()
    denoiser = exact(model)
    x, _ = batch(3)
    labels = torch.tensor([0, 1, 2])
    small = denoiser(x, torch.full((3,), 1e-6).double(), labels)
    torch.testing.assert_close(small, x, rtol=0, atol=1e-6)
    large = denoiser(x, torch.full((3,), 1e6).double(), labels)
    torch.testing.assert_close(large.flatten(1), model.means[labels], rtol=0, atol=1e-9)
    # Without a label: the mean of all, as nothing tells the classes apart.
    every = denoiser(x, torch.full((3,), 1e6).double())
    torch.testing.assert_close(every.flatten(1), (model.frequencies @ model.means).expand(3, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("sigma", [0.0, 0.3, 20.0])
def test_draw_is_a_linear_map_with_exactly_the_covariance(model, sigma) -> None:
    denoiser = exact(model)
    unit = torch.eye(SIZE).double().view(SIZE, *SHAPE)
    for c in range(len(model.means)):
        labels = torch.full((SIZE,), c)
        mean = denoiser.draw(labels, sigma, 0 * unit).flatten(1)
        torch.testing.assert_close(mean[0], model.means[c], **CLOSE)
        root = denoiser.draw(labels, sigma, unit).flatten(1) - mean  # row i: the image of the i-th unit vector
        wanted = dense(model)[c] + sigma**2 * torch.eye(SIZE).double()
        torch.testing.assert_close(root.T @ root, wanted, **CLOSE)
        torch.testing.assert_close(
            root, root.T, **CLOSE
        )  # the symmetric root: noise stays where it is, but for its size
        # Mixed noise levels and images: each depends on its own alone.
        levels = torch.linspace(0, 2, SIZE, dtype=torch.float64)
        mixed = denoiser.draw(labels, levels, unit)
        torch.testing.assert_close(mixed[5:6], denoiser.draw(labels[5:6], float(levels[5]), unit[5:6]), **CLOSE)


def test_classes_are_drawn_by_their_frequencies() -> None:
    model = replace(example(), frequencies=torch.tensor([0.5, 0.0, 0.5]).double())
    denoiser = exact(model)
    near = {"rtol": 0, "atol": 0.01}
    noise = torch.zeros(4, *SHAPE).double()  # so little that it chooses the class and leaves the image alone
    noise[:, 0, 0, 0] = torch.tensor([0.0, 0.49, 0.51, 0.9999999999], dtype=torch.float64) / 2**10 * math.sqrt(SIZE)
    drawn = denoiser.draw(None, 0.0, noise).flatten(1)
    torch.testing.assert_close(drawn, model.means[[0, 0, 2, 2]], **near)
    some = denoiser.draw(torch.tensor([1, 3, 3, 0]), 0.0, noise).flatten(1)
    torch.testing.assert_close(some, model.means[[1, 0, 2, 0]], **near)
    never = exact(replace(model, frequencies=torch.tensor([0.0, 0.5, 0.5]).double()))
    torch.testing.assert_close(never.draw(None, 0.0, noise)[0].flatten(), model.means[1], **near)
    exact(example(k=1)).draw(None, 0.0, noise)
    # In a large sample, and whatever the images look like.
    many = torch.randn(30_000, *SHAPE, generator=torch.Generator().manual_seed(1)).double()
    drawn = exact(example()).draw(None, 0.0, 1e-2 * many).flatten(1)
    counts = (drawn[:, None] - example().means).norm(dim=2).argmin(1).bincount()
    torch.testing.assert_close(counts.double() / len(many), example().frequencies, rtol=0, atol=0.02)


@pytest.mark.parametrize("model", MODELS)
def test_left_is_the_deviation_of_each_pixel_that_the_filter_leaves(model) -> None:
    """√diag(Σ (Σ + σ²I)⁻¹ σ²), against dense matrices; for an unknown class the mean square over classes."""
    denoiser, eye = exact(model), torch.eye(SIZE).double()
    sigma = torch.tensor([0.01, 0.2, 1.0, 30.0]).double()
    squares = []
    for c in range(len(model.means)):
        covariance = dense(model)[c]
        ways = [covariance @ torch.linalg.inv(covariance + s**2 * eye) * s**2 for s in sigma]
        squares.append(torch.stack([w.diagonal() for w in ways]).clamp_min(1e-8))
        got = denoiser.left(sigma, torch.full((4,), c))
        torch.testing.assert_close(got.flatten(1), squares[-1].sqrt(), rtol=1e-6, atol=1e-7)
    pooled = torch.einsum("k,knd->nd", model.frequencies, torch.stack(squares)).sqrt()
    for unknown in (None, torch.full((4,), len(model.means))):
        torch.testing.assert_close(denoiser.left(sigma, unknown).flatten(1), pooled, rtol=1e-6, atol=1e-7)


def test_left_is_met_by_images_of_the_model() -> None:
    model = example()
    denoiser = exact(model)
    gen = torch.Generator().manual_seed(3)
    labels = torch.arange(9000) % 3
    x0 = denoiser.draw(labels, 0.0, torch.randn(9000, *SHAPE, generator=gen).double())
    sigma = torch.full((9000,), 0.5).double()
    x = x0 + 0.5 * torch.randn(9000, *SHAPE, generator=gen).double()
    error = (denoiser(x, sigma, labels) - x0).square()
    for c in range(3):
        wanted = denoiser.left(sigma[:1], torch.tensor([c]))[0]
        torch.testing.assert_close(error[labels == c].mean(0).sqrt(), wanted, rtol=0.08, atol=1e-3)


def test_large_images_are_stationary_outside_the_basis(monkeypatch) -> None:
    """Exact where V are frequencies, which P and F then share; else nearly, and ψ counts by its mean."""
    small = example()
    coarse = dctn(np.eye(SIZE).reshape(-1, *SHAPE), axes=(1, 2, 3), norm="ortho").reshape(SIZE, -1)[:, :4]
    model = replace(small, basis=torch.from_numpy(coarse), rest=torch.full((SIZE,), 0.07).double())
    wanted, (x, sigma) = exact(model), batch(9)
    monkeypatch.setattr("dpsyngen.diffusion.standalone.LARGEST_DIMENSION", SIZE - 1)
    got, labels = exact(model), torch.arange(9) % 4
    assert got.outer.shape == (SIZE, 0)
    torch.testing.assert_close(got(x, sigma, labels), wanted(x, sigma, labels), **CLOSE)
    known = labels % 3
    torch.testing.assert_close(got.draw(known, sigma, x), wanted.draw(known, sigma, x), **CLOSE)
    # One pixel's deviation takes the diagonal of P and of F alone, so it is right in the mean.
    left, exactly = (d.left(sigma, labels).square().mean((1, 2, 3)) for d in (got, wanted))
    torch.testing.assert_close(left, exactly, rtol=0.1, atol=0)

    full = exact(example(d=SIZE))  # nothing is outside
    assert bool(torch.isfinite(full(x, sigma, labels)).all() & torch.isfinite(full.left(sigma, labels)).all())

    flat = exact(replace(small, spectrum=torch.ones(SIZE).double()))
    unit, first = torch.eye(SIZE).double().view(SIZE, *SHAPE), torch.zeros(SIZE).long()
    root = (flat.draw(first, 0.0, unit) - flat.draw(first, 0.0, 0 * unit)).flatten(1)
    outside = torch.eye(SIZE).double() - small.basis @ small.basis.T
    trace = float((outside @ small.rest.diag() @ outside).trace())
    torch.testing.assert_close(outside @ root.T @ root @ outside, outside * (trace / (SIZE - 4)))


def test_fp32_is_close_and_keeps_the_dtype_of_its_input() -> None:
    model = example(size=300, d=20)
    single = ClassGaussians(*(t.float() for t in model.to_tensors().values()))
    x, sigma = batch(50, shape=(3, 10, 10))
    labels = torch.arange(50) % 4
    got = GaussianDenoiser(single, (3, 10, 10))(x, sigma, labels)
    assert got.dtype == torch.float64
    wanted = exact(model, (3, 10, 10))(x, sigma, labels)
    assert float(((got - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)).max()) < 1e-4
    assert GaussianDenoiser(single, (3, 10, 10))(x.float(), sigma, labels).dtype == torch.float32
    assert not list(GaussianDenoiser(single, (3, 10, 10)).parameters())
    assert not GaussianDenoiser(single, (3, 10, 10)).state_dict()  # what is kept are the moments


# ----------------------------------------------------------------------------------------------------- files


def test_round_trip_through_a_file() -> None:
    model = ClassGaussians(*(t.float().contiguous() for t in example().to_tensors().values()))
    again = ClassGaussians.from_tensors(load(save(model.to_tensors())))
    for name, tensor in model.to_tensors().items():
        assert torch.equal(again.to_tensors()[name], tensor)


def broken(name: str, change) -> dict[str, Tensor]:
    tensors = {n: t.clone() for n, t in example().to_tensors().items()}
    tensors[name] = change(tensors[name])
    return tensors


def put(value: float, *index: int):
    def change(tensor: Tensor) -> Tensor:
        tensor[index] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "need the tensors"),
        ({**example().to_tensors(), "extra": torch.zeros(1)}, "need the tensors"),
        (broken("means", put(math.nan, 0, 0)), "means has a value"),
        (broken("basis", put(math.inf, 0, 0)), "basis has a value"),
        (broken("covariances", put(1e30, 0, 0, 0)), "covariances has a value"),
        (broken("frequencies", put(math.nan, 0)), "frequencies has a value"),
        (broken("means", lambda t: t[:, :-1]), "shapes"),
        (broken("means", lambda t: t[0]), "shapes"),
        (broken("means", lambda t: t[:0]), "shapes"),
        (broken("means", lambda t: t.sum()), "shapes"),
        (broken("basis", lambda t: t[:, :0]), "shapes"),
        (broken("covariances", lambda t: t[:2]), "shapes"),
        (broken("rest", lambda t: t[None]), "shapes"),
        (broken("frequencies", lambda t: t[:2]), "shapes"),
        (broken("rest", lambda t: t.long()), "fp32 or fp64"),
        (broken("rest", lambda t: t.half()), "fp32 or fp64"),
        (broken("rest", lambda t: t - 1), "negative"),
        (broken("spectrum", lambda t: t - 1), "negative"),
        (broken("spectrum", lambda t: t[1:]), "shapes"),
        (broken("basis", lambda t: t * 1.01), "orthonormal"),
        (broken("basis", lambda t: torch.cat([t[:, :1], t[:, :-1]], 1)), "orthonormal"),
        (broken("covariances", put(5.0, 1, 0, 1)), "symmetric"),
        (broken("covariances", lambda t: t - 10 * torch.eye(4)), "negative eigenvalue"),
        (broken("frequencies", lambda t: t * 2), "sum to 1"),
        (broken("frequencies", lambda t: torch.tensor([1.5, -0.5, 0.0]).double()), "sum to 1"),
    ],
)
def test_broken_files_are_refused(tensors, words) -> None:
    with pytest.raises(ConfigError, match=words):
        ClassGaussians.from_tensors(tensors)


def test_wrong_shapes_and_labels_are_refused() -> None:
    with pytest.raises(ConfigError, match="12 pixel values"):
        GaussianDenoiser(example(), (1, 4, 4))
    x, sigma = batch(2)
    for label in (-1, 4):
        with pytest.raises(ValueError, match=r"0\.\.3"):
            exact(example())(x, sigma, torch.tensor([0, label]))


def test_a_release_rounded_to_fp32_is_accepted() -> None:
    """A covariance of low rank, whose smallest eigenvalues come out a little below 0."""
    rng = np.random.default_rng(0)
    low = torch.from_numpy(rng.normal(size=(2, 30, 3)))
    basis = torch.linalg.qr(torch.from_numpy(rng.normal(size=(50, 30))))[0]
    tensors = {
        "means": torch.zeros(2, 50),
        "basis": basis,
        "covariances": low @ low.mT,
        "rest": torch.zeros(50),
        "spectrum": torch.ones(50),
        "frequencies": torch.tensor([1 / 3, 2 / 3]),
    }
    model = ClassGaussians.from_tensors({n: t.float() for n, t in tensors.items()})
    out = GaussianDenoiser(model, (1, 5, 10))(
        torch.randn(4, 1, 5, 10), torch.full((4,), 0.002), torch.tensor([0, 1, 2, 2])
    )
    assert torch.isfinite(out).all()
