"""The cosine transform: orthonormal, coarse to fine, the same as the formula."""

from __future__ import annotations

import pytest
import torch

from dpsyngen.diffusion.standalone import cosine_matrix
from dpsyngen.training.spectra import Frequencies


@pytest.mark.parametrize("size", [1, 2, 3, 8, 28])
def test_matrix_is_the_orthonormal_dct(size) -> None:
    from scipy.fft import dct

    eye = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(cosine_matrix(size), torch.from_numpy(dct(eye.numpy(), axis=0, norm="ortho")))
    torch.testing.assert_close(cosine_matrix(size) @ cosine_matrix(size).T, eye)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 6), (1, 5, 7)])
def test_transform_keeps_lengths_and_inverts(shape) -> None:
    f = Frequencies(shape)
    torch.manual_seed(0)
    x = torch.randn(4, f.size, dtype=torch.float64)
    y = f.transform(x)
    torch.testing.assert_close(y @ y.T, x @ x.T)
    torch.testing.assert_close(f.inverse(y), x)
    part = f.transform(x, 10)
    torch.testing.assert_close(part, y[:, :10])
    # The coarsest coefficients alone: the orthogonal projection.
    torch.testing.assert_close(f.transform(f.inverse(part), 10), part)
    torch.testing.assert_close((x - f.inverse(part)) @ f.inverse(part).T, torch.zeros(4, 4, dtype=torch.float64))


def test_order_and_bands() -> None:
    f = Frequencies((1, 8, 8))
    assert f.radius[:4].tolist() == pytest.approx([0, 1, 1, 2**0.5])
    assert bool((f.radius.diff() >= 0).all())
    constant = f.transform(torch.ones(1, 64))
    assert float(constant[0, 0]) == pytest.approx(8)
    assert float(constant[0, 1:].abs().max()) < 1e-12
    assert f.rings.index[:4].tolist() == [0, 1, 1, 1]
    assert sorted(f.rings.index.unique().tolist()) == list(range(11))  # radii 0 .. round(7·√2) = 10


def test_colour_counts_as_twice_as_fine() -> None:
    f = Frequencies((3, 8, 8))
    grey = torch.linspace(-1, 1, 64, dtype=torch.float64).expand(1, 3, 64).reshape(1, -1)
    coefficients = f.transform(grey)[0]
    shown = coefficients.abs() > 1e-9
    # No difference of colours, so only a third of the coefficients can show; none shares a band with one that cannot.
    assert int(shown.sum()) <= 64
    colour = f.transform(torch.cat([torch.ones(1, 64), torch.zeros(1, 64), -torch.ones(1, 64)], 1))[0]
    at = int(colour.abs().argmax())
    assert float(f.radius[at]) == 2.0
    assert not bool(shown[f.rings.index == f.rings.index[at]].any())
