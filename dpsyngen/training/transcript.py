"""What DP-SGD steps did, written down while they are taken.

The noise that a step added is what it released, times the constant that it should have divided by, minus the sum that
went in.  A transcript keeps figures of it that the tests in ``invariants`` need: for all coordinates the squares,
tensor by tensor, and the projection on the sum; the coordinates themselves only for a fixed selection, so that long
audits of large networks fit into memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KEPT = 1 << 16
"""Coordinates whose noise is kept, for correlations between steps."""


@dataclass(frozen=True)
class StepRecord:
    """One DP-SGD step, as it was taken.  Everything but `released` is private.

    Attributes:
        step: its number, from 0.
        chosen: [B] int64, the records that Poisson sampling chose.
        sums: the clipped sum, one tensor a parameter, in units of the gradient.
        released: what the optimizer gets, one tensor a parameter.
    """

    step: int
    chosen: NDArray[np.int64]
    sums: list[Tensor]
    released: list[Tensor]


@dataclass(frozen=True)
class StepTrace:
    """What a transcript keeps of a step.

    Attributes:
        step, chosen: see :class:`StepRecord`.
        charged: steps that the ledger had when this one was taken.
        squares: [tensors] sum of squares of the noise, in units of (z·C)².
        sizes: [tensors] how many coordinates each has.
        sum_norm: L2 norm of the clipped sum.
        along_sum: the noise's coordinate in the direction of the sum, in units of z·C; NaN for a sum of zero.
        noise: [<= KEPT] fp32, the selected coordinates of the noise in units of z·C.
        digest: SHA-256 of the bits of the released tensors.
    """

    step: int
    chosen: NDArray[np.int64]
    charged: int
    squares: NDArray[np.float64]
    sizes: NDArray[np.int64]
    sum_norm: float
    along_sum: float
    noise: NDArray[np.float32]
    digest: str


class Transcript:
    """Collects steps; give it to the training as its observer.

    Args:
        records: how many records there are to sample from.
        noise_scale: z·C as claimed, > 0.
        expected_examples: the constant that the sum is divided by, as claimed.
        charged: how many steps the ledger has now.
    """

    def __init__(self, records: int, noise_scale: float, expected_examples: float, charged: Callable[[], int]) -> None:
        if not (noise_scale > 0 and expected_examples > 0):
            raise ValueError(f"noise_scale={noise_scale} and expected_examples={expected_examples} must be positive.")
        self.records, self.noise_scale, self.expected_examples = records, noise_scale, expected_examples
        self.charged = charged
        self.traces: list[StepTrace] = []
        self._kept: NDArray[np.int64] | None = None

    def add(self, record: StepRecord) -> None:
        """Write a step down."""
        digest = hashlib.sha256()
        squares, noises = [], []
        dot = norm = 0.0
        for total, released in zip(record.sums, record.released, strict=True):
            out = released.detach().double().cpu().flatten()
            digest.update(out.numpy().tobytes())
            clean = total.detach().double().cpu().flatten()
            noise = (out * self.expected_examples - clean) / self.noise_scale
            squares.append(float(noise.square().sum()))
            dot += float(noise @ clean)
            norm += float(clean.square().sum())
            noises.append(noise.float())
        norm = math.sqrt(norm)
        sizes = np.array([len(n) for n in noises], dtype=np.int64)
        self.traces.append(
            StepTrace(
                record.step,
                record.chosen.copy(),
                self.charged(),
                np.array(squares),
                sizes,
                norm,
                dot / norm if norm > 0 else math.nan,
                torch.cat(noises).numpy()[self._selection(int(sizes.sum()))],
                digest.hexdigest(),
            )
        )

    def _selection(self, parameters: int) -> NDArray[np.int64]:
        """The coordinates that are kept: fixed, and not in any step with the layout of the network."""
        if self._kept is None:
            order = np.random.default_rng(0).permutation(parameters)
            self._kept = np.sort(order[:KEPT])
        return self._kept

    @property
    def distinct(self) -> list[StepTrace]:
        """The last attempt at each step, by number."""
        return [t for _, t in sorted({t.step: t for t in self.traces}.items())]
