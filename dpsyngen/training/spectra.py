"""What can be said of a signal under Gaussian noise of *known* variance: post-processing, which costs no privacy.

Vectors: a normal prior in each band, whose variance is learned from all bands (hierarchical Bayes; Lindley & Smith,
"Bayes estimates for the linear model", JRSS B 1972).  Symmetric matrices: the spectrum of noise alone ends at its edge;
an eigenvalue λ of the signal beyond the transition shows as λ + c/λ (Benaych-Georges & Nadakuditi, "The eigenvalues and
eigenvectors of finite, low rank perturbations of large random matrices", Adv. Math. 2011).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dpsyngen.diffusion.standalone import cosine_matrix, each_axis

TYPICAL_ENERGY = 0.6  # of the clipped residuals in R², its largest value: an assumption, not a measurement
SPREAD_OF_ENERGY = 0.25  # about that, for data so few that their energy does not show
_DOUBT = 0.5  # how far a band is from the law, in units of the law
_LEAST = 0.05  # of the law: what is not seen is not nothing
_SPREAD_OF_BANDS = 0.7  # mean of |log τ² - log law|
_SCALE_VARIANCE = 0.25
"""Of the mean variance of one class in units of all together, before anything is seen: a guess, soon overruled."""


@dataclass(frozen=True)
class Bands:
    """Which coefficients are alike: those of a ring of frequencies of one colour, or each of some directions."""

    index: Tensor  # [D] int64, the band of each coefficient, from 0
    radius: Tensor  # [B] fp64, how fine a band is
    colour: Tensor  # [B] int64, of a band; each colour follows a law of its own

    @property
    def number(self) -> Tensor:
        """[B], of coefficients."""
        return torch.bincount(self.index, minlength=len(self.radius))

    def mean(self, values: Tensor) -> Tensor:
        """Of each band, [..., D] -> [..., B] fp64."""
        sums = torch.zeros(*values.shape[:-1], len(self.radius), dtype=torch.float64)
        return sums.index_add_(-1, self.index, values.double()) / self.number


def shrink_bands(values: Tensor, noise_variance: Tensor, bands: Bands) -> Tensor:
    """Posterior means of coefficients that are N(0, τ²) plus noise, with one τ² for each band and all rows.

    τ² is near a law A·(1 + r²)^(-α/2), one for each colour: |log τ² - log law| is exponential of mean 0.7, α is
    N(2.5, 1.5²), A anything.  Few numbers leave all three uncertain, so they are averaged over, on grids.

    Args:
        values: [K, D], rows with noise of different size.
        noise_variance: [K, B] >= 0, of the noise of a row in a band; 0 keeps the row as it is.
        bands: of the D coefficients.

    Returns:
        values · E[τ²/(τ² + noise_variance)], [K, D].
    """
    energies, number = bands.mean(values.square()), bands.number
    top = math.log10(max(float(energies.max()), 1e-8)) + 1
    grid = torch.logspace(top - 10, top, 51, dtype=torch.float64)  # of τ²
    likely = torch.stack(  # [51, B], logarithms
        [-number * ((t + noise_variance).log() + energies / (t + noise_variance)).sum(0) / 2 for t in grid]
    )
    slopes = torch.arange(0, 7.01, dtype=torch.float64)[:, None]
    chance = torch.empty_like(likely)
    for colour in bands.colour.unique():
        mine = bands.colour == colour
        laws = grid[::2].log()[:, None, None] - slopes / 2 * (1 + bands.radius[mine].square()).log()  # [A, α, B]
        prior = torch.log_softmax(-(grid.log()[:, None, None, None] - laws).abs() / _SPREAD_OF_BANDS, 0)
        joint = prior + likely[:, None, None, mine]
        of_law = joint.logsumexp(0).sum(-1) - ((slopes[:, 0] - 2.5) / 1.5).square() / 2
        weights = torch.softmax(of_law.flatten(), 0).view_as(of_law)
        chance[:, mine] = torch.einsum("as,tasb->tb", weights, torch.softmax(joint, 0))
    factors = sum(c * t / (t + noise_variance) for c, t in zip(chance, grid, strict=True))
    return values * torch.where(noise_variance > 0, factors, 1.0)[:, bands.index]


def noise_edge(std: float, size: int) -> float:
    """The largest eigenvalue, to leading order, of a symmetric [m, m] noise matrix, s·√(2m).

    Its standard deviation is s on the diagonal and s/√2 off it (what :func:`dpsyngen.privacy.moments.scatter_sums`
    gets): the semicircle of entries of variance s²/2 ends at 2·√(m·s²/2).
    """
    return std * math.sqrt(2 * size)


def noise_limit(std: float, size: int) -> float:
    """What the largest eigenvalue of noise stays below with a probability of 99 %.

    It is about edge·(1 + X/(2·m^⅔)) with X of the Tracy-Widom law (Tracy & Widom, "On orthogonal and symplectic matrix
    ensembles", Comm. Math. Phys. 1996), of which 2.02 is the 99 % quantile.
    """
    return noise_edge(std, size) * (1 + 2.02 / (2 * size ** (2 / 3)))


def shrunk_number(value: float, noise_variance: float, mean: float, variance: float) -> float:
    """The posterior mean of a number with prior N(mean, variance) that was seen with noise."""
    return mean + (value - mean) * variance / (variance + noise_variance)


def powers(diagonal: Tensor, outside: float, std: float, frequencies: Frequencies, typical: float) -> Tensor:
    """The variance of each cosine coefficient, [D], from those of the m coarsest, seen with noise.

    A prior for each of grey and the colour differences: power A/(1 + r²)^(α/2) at radius r, as that of natural images
    (Field, "Relations between the statistics of natural images", JOSA A 1987), right within half of it.  α, one for
    all, is N(2.5, 1.5²), A the most probable one for each α, and the result the mean over α of the posterior means of
    the bands.  Beyond the m the laws go on, scaled to what was seen of all of them together.

    Args:
        diagonal: [m], what was seen, with noise of standard deviation `std`.
        outside: the sum of the others, with the same noise.
        frequencies: of the images.
        typical: the sum that is expected of all, before anything is seen.
    """
    rings, m, bands = frequencies.rings, len(diagonal), frequencies.rings.index
    count = len(rings.radius)
    number = torch.bincount(bands[:m], minlength=count)  # seen, in each band
    seen = torch.zeros(count, dtype=torch.float64).index_add_(0, bands[:m], diagonal) / number.clamp_min(1)
    noise = std**2 / number.clamp_min(1) + 1e-18
    slopes = torch.arange(0, 7.01, 0.25, dtype=torch.float64)[:, None]
    colours, laws, surprise = int(frequencies.colour.max()), [], ((slopes[:, 0] - 2.5) / 1.5).square()
    for colour in range(colours + 1):
        mine = frequencies.colour == colour
        used = torch.bincount(bands[mine], minlength=count).bool() & (number > 0)
        law = (1 + frequencies.radius.square()).pow(-slopes / 2) * mine  # [slopes, D]
        shape = rings.mean(law)[:, used]
        expected = typical * (0.1 if colour else 1 - 0.1 * colours)
        total, doubt = law.sum(1, keepdim=True), (SPREAD_OF_ENERGY / TYPICAL_ENERGY * typical) ** 2
        variance = noise[used].expand_as(shape)
        for _ in range(10):  # weighted least squares; the weights follow from the fit
            above = (seen[used] * shape / variance).sum(1, keepdim=True) + expected * total / doubt
            below = (shape.square() / variance).sum(1, keepdim=True) + total.square() / doubt
            scale = (above / below).clamp_min(1e-9)  # A
            variance = noise[used] + (_DOUBT * scale * shape).square()
        off = seen[used] - scale * shape
        surprise += (off.square() / variance + variance.log()).sum(1)
        trust = (_DOUBT * scale * shape).square() / variance
        factor = scale.repeat(1, count)  # [slopes, bands]
        factor[:, used] *= (1 + trust * off / (scale * shape)).clamp_min(_LEAST)
        laws.append(law * factor[:, bands])
    result = torch.softmax(-surprise / 2, 0) @ torch.stack(laws).sum(0)
    finer = float(result[m:].sum())
    if finer > 0:
        result[m:] *= max(shrunk_number(outside, std**2, finer, finer**2) / finer, _LEAST)
    return result


def shrink_blocks(matrix: Tensor, std: float, bands: Tensor, power: Tensor) -> Tensor:
    """Posterior means of the entries of a symmetric [m, m] matrix under noise, one variance for each pair of bands.

    As :func:`shrink_bands`, for pairs of frequencies: where neither varies much, hardly anything of the noise is left.

    Args:
        matrix: covariances without diag(power), with noise of standard deviation `std` on the diagonal, std/√2 off it.
        std: >= 0; with 0 the matrix is returned as it is.
        bands: [m] in 0..B-1.
        power: [m], the variances.  A correlation of ½ between any two frequencies is the most that is believed of all.
    """
    if std == 0:
        return matrix
    member = torch.nn.functional.one_hot(bands).double()  # [m, B]
    number = member.sum(0)
    pairs = number[:, None] * number - number.diag()
    squares = member.mT @ (matrix - matrix.diag().diag()).square() @ member
    mean = power @ member / number.clamp_min(1)
    most = _DOUBT**2 * mean[:, None] * mean
    signal = torch.where(pairs > 0, (squares / pairs.clamp_min(1) - std**2 / 2).clamp_min(0).minimum(most), most)
    factor = signal / (signal + std**2 / 2)
    return matrix * factor[bands][:, bands]


def with_sum(eigenvalues: Tensor, total: float) -> Tensor:
    """The nearest ones >= 0, in Frobenius norm of the matrix, of the sum that a covariance is known to have.

    max(λ - θ, 0) of descending λ: what noise adds to the large ones it takes from those that it makes negative.
    """
    theta = (eigenvalues.cumsum(0) - total) / torch.arange(1, len(eigenvalues) + 1)
    kept = int((eigenvalues > theta).sum())
    return (eigenvalues - theta[max(kept, 1) - 1]).clamp_min(0)


def turned_variances(eigenvalues: Tensor, std: float) -> Tensor:
    """The signal's variances along *all* eigenvectors of a noisy matrix, given its eigenvalues λ_i alone.

    ξ_i = λ_i - 2c·(1/d)·Σ_j (λ_i - λ_j)/((λ_i - λ_j)² + η²), c = edge²/4, η = √(c/d): the best estimate among those
    that keep the eigenvectors (Bun, Allez, Bouchaud & Potters, "Rotational invariant estimator for general noisy
    matrices", IEEE Trans. Inf. Theory 2016, for additive noise).  The sum stays.  Noise alone becomes 0, and what
    stands alone beyond the edge λ - c/λ in terms of the signal's λ.
    """
    size = len(eigenvalues)
    c = noise_edge(std, size) ** 2 / 4
    gaps = eigenvalues[:, None] - eigenvalues
    return eigenvalues - 2 * c * (gaps / (gaps.square() + c / size).clamp_min(1e-300)).mean(1)


def denoised_white_covariance(covariance: Tensor, std: float, *, least: float, most: float) -> Tensor:
    """A covariance [d, d] with eigenvalues in [least, most] from a noisy one that is expected near the identity.

    Where no eigenvalue stands out of the noise (standard deviation `std` on the diagonal) it is a multiple of the
    identity, of its mean; where the mean does not show either, the identity.
    """
    size = len(covariance)
    values, vectors = torch.linalg.eigh(covariance)
    mean = float(values.mean())
    if float((values - mean).abs().max()) <= noise_limit(std, size):
        # The mean of d values of the diagonal has noise of variance std²/d.
        signal = torch.full_like(values, shrunk_number(mean, std**2 / size, 1.0, _SCALE_VARIANCE))
    else:
        signal = turned_variances(values, std)
    return (vectors * signal.clamp(least, most)) @ vectors.mT


class Frequencies:
    """The cosine transform of images [C, H, W].

    Attributes:
        size: D = C·H·W.
        radius: [D] fp64, how fine each coefficient is, ascending: √(f_y² + f_x²), twice √(f_y² + f_x² + 1) for a colour
            difference.
        colour: [D] int64, 0 for grey, 1 and 2 for the two colour differences.
        rings: the bands of about one radius, rounded, and one colour.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        c, h, w = shape
        self.shape, self.size = shape, c * h * w
        self._matrices = cosine_matrix(c), cosine_matrix(h), cosine_matrix(w)
        colour, fy, fx = (a.flatten() for a in torch.meshgrid(*map(torch.arange, shape), indexing="ij"))
        squares = (fy.square() + fx.square()).double()
        radius = torch.where(colour == 0, squares, 4 * (squares + 1)).sqrt()
        self._order = torch.argsort(radius, stable=True)
        self.radius = radius[self._order]
        self.colour = colour[self._order]
        rings, index = torch.unique(shape[0] * radius.round().long() + colour, return_inverse=True)
        self.rings = Bands(index[self._order], (rings // shape[0]).double(), rings % shape[0])

    def transform(self, flat: Tensor, count: int | None = None) -> Tensor:
        """The `count` coarsest coefficients (all, if None) of images [N, D]: [N, count], fp64."""
        return each_axis(flat.double(), self._matrices)[:, self._order[:count]]

    def inverse(self, coefficients: Tensor) -> Tensor:
        """Images [N, D] of their coarsest coefficients [N, count]; the others are 0."""
        return each_axis(self.in_order(coefficients), [m.mT for m in self._matrices])

    def in_order(self, coefficients: Tensor) -> Tensor:
        """[N, D] in the order [C, H, W] from the coarsest [N, count]; the others are 0."""
        every = coefficients.new_zeros(len(coefficients), self.size, dtype=torch.float64)
        every[:, self._order[: coefficients.shape[1]]] = coefficients.double()
        return every
