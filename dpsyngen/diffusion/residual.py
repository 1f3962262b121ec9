"""A network on top of a Gaussian: it learns what second moments do not say.

Above some noise level the optimal denoiser is that of a Gaussian with the data's moments.  Below, it still is most of
the answer.  A network that had to learn it again, from noisy gradients, would spend its privacy budget on what is known
already; this one starts as the Gaussian's denoiser, and each step adds to it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpsyngen.diffusion.denoiser import NetworkDenoiser
from dpsyngen.diffusion.gaussian import GaussianDenoiser


class ResidualDenoiser(NetworkDenoiser):
    """D = G(x; σ, y) + c_out·F([c_in·x, c_base·G], c_noise, y).

    G is the Gaussian's denoiser.  c_out(σ, y) is the root mean square of its error if the data were that Gaussian
    (:meth:`GaussianDenoiser.residual_std`), and λ = 1/c_out²: the loss of each σ is 1 where F = 0 and the data are
    Gaussian, as EDM's is at the start.  c_in = 1/√(σ² + σ_g²) and c_base = 1/σ_g with σ_g the Gaussian's own root
    mean square.  F ends in a layer that starts at almost 0, so training starts from G.

    The moments are constants: the network alone has parameters, and is alone in ``state_dict``.

    Args:
        network: F(input [N, 2C, H, W], c_noise [N], classes [N] or None) -> [N, C, H, W].
        num_classes: 0 for an unconditional network.
        gaussian: G.
    """

    def __init__(self, network: nn.Module, num_classes: int, gaussian: GaussianDenoiser) -> None:
        super().__init__()
        self.network, self.num_classes = network, num_classes
        # In a list: neither its buffers nor itself are part of what is trained, saved and released with the network.
        self._gaussian = [gaussian]

    @property
    def gaussian(self) -> GaussianDenoiser:
        """G."""
        return self._gaussian[0]

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """See :class:`dpsyngen.diffusion.denoiser.Denoiser`.  A label equal to ``num_classes`` means "no class"."""
        levels = sigma.to(x.dtype)
        with torch.no_grad():
            base = self.gaussian(x, levels, labels)
            c_out = self.gaussian.residual_std(levels, labels).view(-1, 1, 1, 1)
            c_in = (levels.square() + self.gaussian.pixel_std**2).rsqrt().view(-1, 1, 1, 1)
            both = torch.cat([c_in * x, base / self.gaussian.pixel_std], 1)
        return base + c_out * self.network(both, levels.log() / 4, self.classes_of(x, labels))

    def weight(self, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """1/c_out²."""
        with torch.no_grad():
            return self.gaussian.residual_std(sigma, labels).square().reciprocal()

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Moves G along with the network (``.to(device)``)."""
        self._gaussian[0] = self._gaussian[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)
