"""Kernel distance: the squared maximum mean discrepancy under a cubic kernel (KID, Bińkowski et al. 2018, §4)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import ConfigError
from dpsyngen.evaluation.scatter import Estimate

SUBSETS = 100
SUBSET_SIZE = 1000
_BLOCK_BYTES = 64 * 2**20

_Sums = tuple[NDArray[np.float64], NDArray[np.float64]]


class KernelDistance:
    """The distance of features from those of real images.

    MMD² = mean k(x, x') + mean k(y, y') − 2 mean k(x, y) over pairs of different images, unbiased, with
    k(x, y) = (⟨x, y⟩/d + 1)³.  It is averaged over 100 random subsets of 1,000 images, as torch-fidelity and others do,
    with the same draws as torch-fidelity's for the same seed.  It can be negative where the sets are alike.

    All pairs are met in blocks, once: what is added up for each subset follows from its rows of the block.

    Args:
        real: features of real images [m, d], m >= 2.
        seed: of the subsets.
        subsets: how many subsets.
        subset_size: images in a subset; of smaller sets, all.
    """

    def __init__(
        self, real: NDArray[np.float32], *, seed: int, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE
    ) -> None:
        if subsets < 1 or subset_size < 2:
            raise ConfigError(f"{subsets} subsets of {subset_size} images: at least 1 of 2 images are needed.")
        self._real, self._seed, self._subsets, self._size = real, seed, subsets, subset_size
        self._of_real: dict[tuple[int, int], NDArray[np.float64]] = {}

    def __call__(self, features: NDArray[np.float32], scatter: bool = False) -> Estimate:
        """The distance of features [n, d], n >= 2; with the influence of each image if `scatter` is asked for.

        The influence is that on the distance of all pairs, which the subsets estimate.

        Raises:
            ConfigError: fewer than two images.
        """
        n, m = len(features), len(self._real)
        if min(n, m) < 2:
            raise ConfigError(f"a kernel distance needs at least 2 images of either kind, not {n} and {m}.")
        size = min(self._size, n, m)
        x, y = _memberships(n, m, size, self._subsets, self._seed)
        xx, rows_x = _sums(features, features, x, x, same=True)
        xy, rows_y = _sums(features, self._real, x, y, same=False)
        # The draws from the real images depend on n, since they come from one generator.
        if (n, size) not in self._of_real:
            self._of_real[n, size] = _sums(self._real, self._real, y, y, same=True)[0]
        pairs = size * (size - 1)
        value = float(((xx + self._of_real[n, size]) / pairs - 2 * xy / size**2).mean())
        influence = None
        if scatter:
            influence = 2 * (rows_x / (n - 1) - rows_y / m)
            influence -= influence.mean()
        return Estimate(value, f"mean of {self._subsets} subsets of {size:,} images", influence)


def _memberships(n: int, m: int, size: int, subsets: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Which of n and of m images are in each subset: 0 or 1, [n, subsets] and [m, subsets]."""
    x, y = np.zeros((n, subsets), np.float32), np.zeros((m, subsets), np.float32)
    rng = np.random.RandomState(seed % 2**32)  # NumPy's old generator: torch-fidelity draws from it, in this order
    for s in range(subsets):
        x[rng.choice(n, size, replace=False), s] = 1
        y[rng.choice(m, size, replace=False), s] = 1
    return x, y


def _sums(
    a: NDArray[np.float32], b: NDArray[np.float32], in_a: NDArray[np.float32], in_b: NDArray[np.float32], *, same: bool
) -> _Sums:
    """Sums of k(a_i, b_j), i ≠ j if `same`: within each subset [subsets], and over all j for each i [len(a)]."""
    total, rows = np.zeros(in_a.shape[1]), np.empty(len(a))
    step = max(1, _BLOCK_BYTES // (4 * len(b)))
    for start in range(0, len(a), step):
        part = slice(start, start + step)
        inner = a[part] @ b.T
        inner *= np.float32(1 / a.shape[1])
        inner += 1
        kernel = inner * inner
        kernel *= inner
        if same:
            i = np.arange(len(kernel))
            kernel[i, start + i] = 0
        total += ((kernel @ in_b) * in_a[part]).sum(0, dtype=np.float64)
        rows[part] = kernel.sum(1, dtype=np.float64)
    return total, rows
