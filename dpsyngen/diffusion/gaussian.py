"""The denoiser that follows from means and covariances alone, in closed form.

If images of a class c are N(μ_c, Σ_c), then E[x₀ | x₀ + σ·n = x, c] = μ_c + Σ_c (Σ_c + σ²I)⁻¹ (x - μ_c), the Wiener
filter.  Whatever the images are, this is the best *affine* denoiser, and as σ → ∞ the best of all.  It needs no network
and no training; and x at any σ can be drawn from N(μ_c, Σ_c + σ²I) at once, without sampling steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from dpsyngen.errors import ConfigError
from dpsyngen.full_precision import in_full_precision

LARGEST_DIMENSION = 4096
"""Of an image whose covariance outside the basis is diagonalised; that of a larger one is taken as stationary."""

_LARGEST_NUMBER = 1e6
_TOLERANCE = 1e-4


def cosine_matrix(size: int) -> Tensor:
    """[size, size] fp64, the orthonormal DCT-II: row f is √(2/size)·cos(π f (2i + 1) / (2 size)), row 0 over √2."""
    f, i = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)[None]
    matrix = (math.pi * f * (2 * i + 1) / (2 * size)).cos() * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def each_axis(flat: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Apply a matrix to each axis of images [N, D] = [N, C, H, W]: with :func:`cosine_matrix` of each axis, F."""
    c, h, w = matrices
    images = h @ flat.view(-1, len(c), len(h), len(w)) @ w.mT
    return (torch.einsum("kc,nchw->nkhw", c, images) if len(c) > 1 else images).flatten(1)


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
        self._check_values()

    def _check_values(self) -> None:
        basis, covariances = self.basis.double(), self.covariances.double()
        if (basis.mT @ basis - torch.eye(basis.shape[1], dtype=torch.float64)).abs().max() > _TOLERANCE:
            raise ConfigError("Gaussian moments: the columns of the basis are not orthonormal.")
        size = _TOLERANCE * covariances.abs().amax((1, 2), keepdim=True).clamp_min(1e-12)
        if ((covariances - covariances.mT).abs() > size).any():
            raise ConfigError("Gaussian moments: a covariance is not symmetric.")
        if (_eigh(covariances)[0] < -size[:, 0]).any():
            raise ConfigError("Gaussian moments: a covariance has a negative eigenvalue.")
        if (self.rest < 0).any() or (self.spectrum < 0).any():
            raise ConfigError("Gaussian moments: a variance outside the basis is negative.")
        if (self.frequencies < 0).any() or abs(float(self.frequencies.double().sum()) - 1) > _TOLERANCE:
            raise ConfigError("Gaussian moments: the class frequencies must be at least 0 and sum to 1.")

    @property
    def classes(self) -> int:
        """K."""
        return int(self.means.shape[0])

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


class GaussianDenoiser(nn.Module):
    """The Wiener filter of each class as a :class:`dpsyngen.diffusion.denoiser.Denoiser`; nothing to train.

    In the orthonormal basis (V, Q), Q the eigenvectors of what is outside V, the covariances are A_c on V and diag(ρ)
    on Q, so a batch costs one product with the basis each way, whatever its classes and noise levels.  For images of
    more than 4,096 values (`shape` is (C, H, W)) Q would not be worth its memory: there F takes its place, with
    ρ = q · mean ψ, as if P and F commuted, which they nearly do (V are coarse patterns).
    """

    means: Tensor
    means_in: Tensor
    means_out: Tensor
    basis: Tensor
    outer: Tensor
    turns: Tensor
    inner_variances: Tensor
    outer_variances: Tensor
    log_frequencies: Tensor
    cosines_c: Tensor
    cosines_h: Tensor
    cosines_w: Tensor

    def __init__(
        self, gaussians: ClassGaussians, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        size, d = gaussians.basis.shape
        if math.prod(shape) != size:
            raise ConfigError(
                f"Gaussian moments are of {size} pixel values, but an image {list(shape)} has {math.prod(shape)}."
            )
        self.gaussians, self.shape, self.classes, self.dimension = gaussians, shape, gaussians.classes, size
        means, rest, spectrum = gaussians.means.double(), gaussians.rest.double(), gaussians.spectrum.double()
        self.large = size > LARGEST_DIMENSION
        # V, orthonormal to the last digit, and a basis of its orthogonal complement (of [D, 0] for large images).
        mode = "reduced" if self.large else "complete"
        complete, triangle = torch.linalg.qr(gaussians.basis.double(), mode=mode)
        basis, outer = complete[:, :d] * triangle.diagonal().sign(), complete[:, d:]
        values, turns = _eigh(gaussians.covariances.double())
        cosines = [cosine_matrix(n) for n in shape]
        if self.large:
            share = 1 - basis.square().sum(1)  # [D], diagonal of P
            rho = spectrum * (share @ rest / share.sum().clamp_min(1e-12))
        else:
            textures = each_axis((outer * rest.sqrt()[:, None]).mT, cosines)  # F √ψ Q, transposed: [D - d, D]
            rho, inner_turns = torch.linalg.eigh((textures * spectrum) @ textures.mT)
            outer = outer @ inner_turns
        frequencies = gaussians.frequencies.double()
        kept = {"means": means, "means_in": means @ basis, "basis": basis, "outer": outer, "turns": turns}
        kept |= {"inner_variances": values.clamp_min(0), "outer_variances": rho.clamp_min(0)}
        kept |= dict(zip(("cosines_c", "cosines_h", "cosines_w"), cosines, strict=True))
        for name, tensor in (kept | {"log_frequencies": frequencies.log()}).items():
            # Not persistent: the model's own tensors are what is kept.
            self.register_buffer(name, tensor.to(dtype).contiguous(), persistent=False)
        self.register_buffer("means_out", self._across(self.means), persistent=False)

    @in_full_precision
    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """E[x₀ | x, label], exact for the model, [N, C, H, W] in the dtype of x [N, C, H, W], at sigma [N], > 0.

        labels [N] are in 0..K; K, or None for all, means "class unknown": the posterior mean of the mixture.
        """
        flat = x.to(self.means.dtype).flatten(1)  # [N, D]
        square = sigma.to(self.means.dtype).square().view(-1, 1)  # σ², [N, 1]
        along, across = flat @ self.basis, self._across(flat)  # coordinates in V, [N, d], and outside it
        inner, mean_out = torch.empty_like(along), torch.empty_like(across)
        for label, rows in self._groups(labels, len(x)):
            if label < self.classes:
                inner[rows] = self._filtered(along[rows], square[rows], label)[0]
                mean_out[rows] = self.means_out[label]
            else:
                inner[rows], mean_out[rows] = self._mixture(along[rows], across[rows], square[rows])
        gain = self.outer_variances / (self.outer_variances + square)  # ρ/(ρ + σ²), the same for all classes
        return self._image(inner, mean_out + gain * (across - mean_out), x.dtype)

    @property
    def _cosines(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.cosines_c, self.cosines_h, self.cosines_w

    def _across(self, flat: Tensor) -> Tensor:
        """The part of x outside the basis: its coordinates in Q, or in F of a large image."""
        return each_axis(flat - (flat @ self.basis) @ self.basis.mT, self._cosines) if self.large else flat @ self.outer

    def _image(self, along: Tensor, across: Tensor, dtype: torch.dtype) -> Tensor:
        if self.large:
            outside = each_axis(across, [m.mT for m in self._cosines])
            outside = outside - (outside @ self.basis) @ self.basis.mT
        else:
            outside = across @ self.outer.mT
        return (along @ self.basis.mT + outside).to(dtype).view(-1, *self.shape)

    def _groups(self, labels: Tensor | None, count: int) -> Iterator[tuple[int, Tensor]]:
        """Each label with the rows that have it; where there are none, K ("class unknown") with all `count` rows."""
        if labels is None:
            labels = torch.full((count,), self.classes, device=self.means.device)
        for label in labels.unique().tolist():
            if not 0 <= label <= self.classes:
                raise ConfigError(f"a label is {label}, but must be in 0..{self.classes}.")
            yield label, (labels == label).nonzero()[:, 0]

    def _filtered(self, along: Tensor, square: Tensor, label: int) -> tuple[Tensor, Tensor]:
        """Coordinates in V of the filtered image, [N, d], and those of the noisy one in the eigenvectors of A_c."""
        turned = (along - self.means_in[label]) @ self.turns[label]
        variances = self.inner_variances[label]
        gain = variances / (variances + square)  # λ/(λ + σ²) in each direction
        return self.means_in[label] + (gain * turned) @ self.turns[label].mT, turned

    def _mixture(self, along: Tensor, across: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        """The same for an unknown class: filtered coordinates in V and mean outside it, averaged over p(class | x)."""
        outer_total = self.outer_variances + square
        log_chances, filtered = [], []
        for label, mean in enumerate(self.means_out):
            image, turned = self._filtered(along, square, label)
            total = self.inner_variances[label] + square
            # -2 log p(x | class) without the terms that all classes share (the determinant outside the basis is one).
            distance = (turned.square() / total + total.log()).sum(1) + ((across - mean).square() / outer_total).sum(1)
            log_chances.append(self.log_frequencies[label] - distance / 2)
            filtered.append(image)
        chances = torch.softmax(torch.stack(log_chances, 1), 1)
        return torch.einsum("nk,knd->nd", chances, torch.stack(filtered)), chances @ self.means_out

    @in_full_precision
    def draw(
        self, labels: Tensor | None, sigma: Tensor | float, noise: Tensor, uniform: Tensor | None = None
    ) -> Tensor:
        """Draw x = x₀ + σ·n from the model at once: μ_c + (Σ_c + σ²I)^½ noise, [N, C, H, W].

        Args:
            labels: [N] in 0..K; of K, or with None, the class is drawn by ``frequencies``.
            sigma: σ >= 0, one for all or [N].
            noise: standard normal, [N, C, H, W].
            uniform: [N] in [0, 1), which the class is drawn by where it is not given; not needed where K is 1.
        """
        flat = noise.to(self.means.dtype).flatten(1)
        level = torch.as_tensor(sigma, dtype=self.means.dtype, device=flat.device).expand(len(flat))
        square = level.square().view(-1, 1)
        along = flat @ self.basis
        across = (self.outer_variances + square).sqrt() * self._across(flat)
        for label, rows in self._groups(self._drawn_classes(labels, len(flat), uniform), len(flat)):
            turned = (self.inner_variances[label] + square[rows]).sqrt() * (along[rows] @ self.turns[label])
            along[rows] = self.means_in[label] + turned @ self.turns[label].mT
            across[rows] += self.means_out[label]
        return self._image(along, across, noise.dtype)

    def _drawn_classes(self, labels: Tensor | None, count: int, uniform: Tensor | None) -> Tensor:
        device = self.means.device
        known = torch.full((count,), self.classes, device=device) if labels is None else labels.to(device)
        unknown = known == self.classes
        if not bool(unknown.any()):
            return known
        if self.classes == 1:
            return torch.zeros_like(known)
        if uniform is None:
            raise ConfigError("classes are to be drawn, so `uniform` is needed: one number in [0, 1) for each image.")
        edges = self.log_frequencies.double().exp().cumsum(0)
        drawn = torch.searchsorted(edges / edges[-1], uniform.double().to(device), right=True)
        return torch.where(unknown, drawn.clamp_max(self.classes - 1), known)

    @in_full_precision
    def left(self, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """s(σ), [N, C, H, W]: the standard deviation of each pixel of x₀ given x, if the model is right.

        √diag(Σ_c (Σ_c + σ²I)⁻¹ σ²).  For an unknown class the root of the mean square over classes, by frequency.
        """
        square = sigma.to(self.means.dtype).square().view(-1, 1)  # σ², [N, 1]

        def kept(variances: Tensor, squares: Tensor) -> Tensor:
            return variances * squares / (variances + squares)

        outside = kept(self.outer_variances, square)
        if self.large:  # the diagonals of Fᵀ diag(.) F and of P
            outside = each_axis(outside, [m.square().mT for m in self._cosines]) * (1 - self.basis.square().sum(1))
        else:
            outside = outside @ self.outer.square().mT
        inside = torch.zeros_like(outside)
        for label, rows in self._groups(labels, len(square)):
            weights = [(label, 1.0)] if label < self.classes else list(enumerate(self.log_frequencies.exp().tolist()))
            for c, weight in weights:
                directions = (self.basis @ self.turns[c]).square()  # [D, d]
                inside[rows] += weight * (kept(self.inner_variances[c], square[rows]) @ directions.mT)
        return (inside + outside).clamp_min(1e-8).sqrt().view(-1, *self.shape)


def _eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of matrices that are symmetric but for rounding."""
    try:
        return torch.linalg.eigh((matrices + matrices.mT) / 2)
    except RuntimeError as error:  # no convergence
        raise ConfigError(f"Gaussian moments: a covariance has no eigenvalues ({error}).") from None
