"""The denoiser that follows from means and covariances alone, in closed form.

If images of a class c are N(μ_c, Σ_c), then E[x₀ | x₀ + σ·n = x, c] = μ_c + Σ_c (Σ_c + σ²I)⁻¹ (x - μ_c), the Wiener
filter.  Whatever the images are, this is the best *affine* denoiser, and as σ → ∞ the best of all.  It needs no network
and no training; and x at any σ can be drawn from N(μ_c, Σ_c + σ²I) at once, without sampling steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dpsyngen.diffusion.standalone import Gaussian
from dpsyngen.errors import ConfigError
from dpsyngen.full_precision import in_full_precision

_LARGEST_NUMBER = 1e6
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class ClassGaussians:
    """One Gaussian for each class, Σ_c = V A_c Vᵀ + P √ψ Fᵀ diag(q) F √ψ P, with P = I - V Vᵀ and √ψ = diag(ψ)^½.

    F is the orthonormal cosine transform: outside the basis images are a stationary texture of spectrum q, stronger
    where ψ is.  D is the number of pixel values of an image, in the order [C, H, W]; d <= D.  Else ConfigError.

    Attributes:
        means: μ, [K, D].
        basis: V, [D, d], orthonormal columns; the same for all classes.
        covariances: A, [K, d, d], symmetric and positive semi-definite.
        rest: ψ, [D], >= 0: of each pixel.
        spectrum: q, [D], >= 0: of each frequency, in the order of F.  With q = 1, ψ is the variance of each pixel.
        frequencies: [K], of the classes, >= 0, summing to 1.
    """

    means: Tensor
    basis: Tensor
    covariances: Tensor
    rest: Tensor
    spectrum: Tensor
    frequencies: Tensor

    def __post_init__(self) -> None:
        tensors = self.to_tensors()
        for name, tensor in tensors.items():
            if tensor.dtype not in (torch.float32, torch.float64):
                raise ConfigError(f"Gaussian moments: {name} must be fp32 or fp64, not {tensor.dtype}.")
        k, size = self.means.shape if self.means.ndim == 2 else (0, 0)
        d = self.basis.shape[-1] if self.basis.ndim == 2 else 0
        wanted = ((k, size), (size, d), (k, d, d), (size,), (size,), (k,))  # in the order of the fields
        if not (k and 1 <= d <= size) or tuple(tuple(t.shape) for t in tensors.values()) != wanted:
            raise ConfigError(
                f"Gaussian moments have shapes { {n: list(t.shape) for n, t in tensors.items()} }, but must be means "
                "[K, D], basis [D, d], covariances [K, d, d], rest [D], spectrum [D] and frequencies [K] with "
                "K >= 1 and 1 <= d <= D."
            )
        for name, tensor in tensors.items():
            # NaN fails the comparison, too.
            if not bool((tensor.abs() <= _LARGEST_NUMBER).all()):
                raise ConfigError(f"Gaussian moments: {name} has a value that is not a number or above 1e6.")
        basis, covariances = self.basis.double(), self.covariances.double()
        if (basis.mT @ basis - torch.eye(basis.shape[1], dtype=torch.float64)).abs().max() > _TOLERANCE:
            raise ConfigError("Gaussian moments: the columns of the basis are not orthonormal.")
        rounding = _TOLERANCE * covariances.abs().amax((1, 2), keepdim=True).clamp_min(1e-12)
        if ((covariances - covariances.mT).abs() > rounding).any():
            raise ConfigError("Gaussian moments: a covariance is not symmetric.")
        if (torch.linalg.eigvalsh((covariances + covariances.mT) / 2) < -rounding[:, 0]).any():
            raise ConfigError("Gaussian moments: a covariance has a negative eigenvalue.")
        if (self.rest < 0).any() or (self.spectrum < 0).any():
            raise ConfigError("Gaussian moments: a variance outside the basis is negative.")
        if (self.frequencies < 0).any() or abs(float(self.frequencies.double().sum()) - 1) > _TOLERANCE:
            raise ConfigError("Gaussian moments: the class frequencies must be at least 0 and sum to 1.")

    def to_tensors(self) -> dict[str, Tensor]:
        """The tensors by name, as a file keeps them."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> ClassGaussians:
        """The inverse of :meth:`to_tensors`; ConfigError for anything else."""
        names = {f.name for f in fields(cls)}
        if set(tensors) != names:
            raise ConfigError(f"Gaussian moments need the tensors {sorted(names)}, but there are {sorted(tensors)}.")
        return cls(**tensors)


class GaussianDenoiser(Gaussian):
    """The Wiener filter of each class as a :class:`dpsyngen.diffusion.denoiser.Denoiser`; nothing to train.

    In the orthonormal basis (V, Q), Q the eigenvectors of what is outside V, the covariances are A_c on V and diag(ρ)
    on Q, so a batch costs one product with the basis each way, whatever its classes and noise levels.  For images of
    more than 4,096 values (`shape` is (C, H, W)) Q would not be worth its memory: there F takes its place, with
    ρ = q · mean ψ, as if P and F commuted, which they nearly do (V are coarse patterns).

    ``forward(x, sigma, labels)`` is exact for the model, in the dtype of x, at σ > 0; labels are [N] in 0..K, and K, or
    None for all, means "class unknown".  In ``draw(labels, sigma, noise)``, σ >= 0 is [N] or one for all rows, and an
    unknown class is drawn by frequency, as a function of the noise.  ``left(sigma, labels)`` is
    s(σ) = √diag(Σ_c (Σ_c + σ²I)⁻¹ σ²); for an unknown class the root of the mean square over classes, by frequency.
    """

    def __init__(
        self, gaussians: ClassGaussians, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32
    ) -> None:
        size = len(gaussians.basis)
        if math.prod(shape) != size:
            raise ConfigError(
                f"Gaussian moments are of {size} pixel values, but an image {list(shape)} has {math.prod(shape)}."
            )
        super().__init__(gaussians.to_tensors(), shape, dtype)
        self.gaussians = gaussians

    # The same, without the autocast and TF32 of whoever calls: standalone.py stands alone and cannot do that itself.
    forward = in_full_precision(Gaussian.forward)
    draw = in_full_precision(Gaussian.draw)
    left = in_full_precision(Gaussian.left)
