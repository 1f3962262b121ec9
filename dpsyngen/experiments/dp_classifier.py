"""A classifier trained on private images by DP-SGD: what the images could be used for without a generator.

What is taken from where:

- Tramèr & Boneh (arXiv 2011.11660): a linear classifier on normalised scattering features ("scattering"), a large
  batch and momentum.  It is the default: the stronger of the two, and the cheaper.
- Papernot et al. (arXiv 2007.14191): tanh, which keeps activations and so gradients bounded ("cnn").
- De et al. (arXiv 2204.13650): group normalisation, the largest batch that can be computed, few steps, an
  exponential moving average of the weights.

No private image is held back to choose anything: the last average is what is scored.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from dpsyngen.diffusion.ema import Ema
from dpsyngen.errors import ConfigError
from dpsyngen.experiments.dp_scattering import Scattering
from dpsyngen.privacy.accounting import Mechanism
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.privacy.noise import noisy_mean
from dpsyngen.privacy.per_example import PerExampleGradients
from dpsyngen.privacy.randomness import Randomness, poisson_sample

Network = Literal["scattering", "cnn"]
NETWORKS: tuple[Network, ...] = get_args(Network)

_LARGEST_BATCH = 4096
_MOMENTUM = 0.9
_AT_ONCE = 500


@dataclass(frozen=True)
class DpSettings:
    """The constants of a training; all of them public.

    Attributes:
        network: "scattering" (linear on fixed features) or "cnn".
        records: declared number of records n.
        steps: DP-SGD steps.
        batch: expected batch, at most n.
        learning_rate: of SGD with momentum 0.9.
        clipping_norm: C.
        noise_multiplier: z > 0.
        ema: decay of the average of the weights.
        physical_batch: images in memory at a time.
    """

    network: Network
    records: int
    steps: int
    batch: int
    learning_rate: float
    clipping_norm: float
    noise_multiplier: float
    ema: float
    physical_batch: int = 256

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise ConfigError(f"network is {self.network!r}, but must be one of {', '.join(NETWORKS)}.")
        if not 1 <= self.batch <= self.records:
            raise ConfigError(f"batch is {self.batch}, but must be 1 to {self.records}, the number of images.")
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}, but must be at least 1.")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ConfigError(f"learning_rate is {self.learning_rate}, but must be positive and finite.")
        if not self.noise_multiplier > 0:
            raise ConfigError(f"noise_multiplier is {self.noise_multiplier}, but must be positive: nothing is private.")

    @property
    def sampling_rate(self) -> float:
        """q: expected batch over declared records."""
        return self.batch / self.records

    def mechanism(self) -> Mechanism:
        """What the whole training is to the accountant."""
        return Mechanism(self.sampling_rate, self.noise_multiplier, self.steps)


def settings_by_rule(network: Network, records: int, epsilon: float) -> dict[str, Any]:
    """steps, batch, learning_rate, clipping_norm and ema from what is public: n and ε.

    The noise of a mean falls with the batch at given ε and steps, so the batch is the largest that is cheap: all images
    up to 4,096.  Steps: 400 (cnn: 200) where ε·n reaches 50,000, in proportion fewer below but 50 (25) at least: the
    noise of each grows with their number, and with less signal there is less to be learned from many.  The learning
    rate of the linear classifier grows with √(ε·n) from there, up to fourfold.  These figures were chosen on a held-out
    sixth of Fashion-MNIST's training images (docs/cas.md); for any other data they are constants.
    """
    signal = epsilon * records / 50_000
    most, rate, norm = (400, 8.0, 0.1) if network == "scattering" else (200, 2.0, 1.0)
    if network == "scattering":
        rate *= min(max(math.sqrt(signal), 1.0), 4.0)
    return {
        "steps": max(most // 8, round(most * min(1.0, signal))),
        "batch": min(records, _LARGEST_BATCH),
        "learning_rate": rate,
        "clipping_norm": norm,
        "ema": 0.98,
    }


def make_dp_cnn(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Three strided convolutions of 16, 32 and 32 channels with group normalisation and tanh, and a linear layer.

    19,594 parameters on 1×28×28 images in 10 classes.  Above 32 pixels images are averaged down to 32 at most.
    """
    channels, height, width = shape
    shrink = -(-max(height, width) // 32)
    layers: list[nn.Module] = [nn.AvgPool2d(shrink, ceil_mode=True)] if shrink > 1 else []
    for before, after, kernel in ((channels, 16, 5), (16, 32, 3), (32, 32, 3)):
        layers += [nn.Conv2d(before, after, kernel, 2, kernel // 2), nn.GroupNorm(4, after), nn.Tanh()]
    layers.append(nn.Flatten())
    with torch.no_grad():
        flat = nn.Sequential(*layers)(torch.zeros(1, *shape)).shape[1]
    return nn.Sequential(*layers, nn.Linear(flat, classes))


class DpClassifier:
    """A network, and what turns images into its inputs.

    Args:
        network: see :class:`DpSettings`.
        shape: [C, H, W] of the images.
        classes: number of classes.
        seed: of the initial weights, which are public.
        device: where to compute.
    """

    def __init__(
        self, network: Network, shape: tuple[int, ...], classes: int, *, seed: int = 0, device: str = "cpu"
    ) -> None:
        self.device = device
        self._features = Scattering(shape) if network == "scattering" else None
        if self._features:
            linear = nn.Linear(math.prod(self._features.features), classes)
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
            module: nn.Module = nn.Sequential(nn.Flatten(), linear)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                module = make_dp_cnn(shape, classes)
        self.module = module.to(device)

    @property
    def parameters(self) -> int:
        """Trainable numbers."""
        return sum(p.numel() for p in self.module.parameters())

    def prepared(self, images: NDArray[np.uint8]) -> Tensor:
        """uint8 [N, C, H, W] -> inputs [N, ...], each from its own image and public constants."""
        return self._features.of(images) if self._features else torch.from_numpy(np.ascontiguousarray(images).copy())

    def logits(self, inputs: Tensor) -> Tensor:
        """Rows of :meth:`prepared` -> [B, classes]."""
        x = inputs.to(self.device).float()
        out: Tensor = self.module(x if self._features else x.div_(127.5).sub_(1))
        return out

    @torch.no_grad()
    def predict(self, inputs: Tensor) -> NDArray[np.int64]:
        """Rows of :meth:`prepared` -> classes [N]."""
        return torch.cat([self.logits(part).argmax(1).cpu() for part in inputs.split(_AT_ONCE)]).numpy()


def train_dp_classifier(
    classifier: DpClassifier,
    inputs: Tensor,
    labels: NDArray[np.int64],
    settings: DpSettings,
    *,
    ledger: Ledger,
    randomness: Randomness,
    on_progress: Callable[[str], None] | None = None,
) -> None:
    """DP-SGD from the classifier's initial weights; afterwards it has the average of the weights.

    Formal guarantee: the weights are a post-processing of ``settings.steps`` runs of the Poisson-subsampled Gaussian
    mechanism, all of which the ledger has before the first one looks at a record.  `on_progress` tells the number of
    the step and nothing of the data.

    Args:
        classifier: trained in place.
        inputs: of the private images, see :meth:`DpClassifier.prepared`.
        labels: their classes [N].
        settings: the constants.
        ledger: charged with the whole training at once: a training that is broken off cannot be resumed.
        randomness: secret streams; its step numbers from 0 are used up.
        on_progress: called with a line now and then.

    Raises:
        BudgetExceeded: the training would exceed the ledger's target; nothing was trained.
    """
    s = settings
    engine = PerExampleGradients(classifier.module, s.clipping_norm)
    optimizer = torch.optim.SGD(engine.parameters, lr=s.learning_rate, momentum=_MOMENTUM)
    ema = Ema(classifier.module, s.ema)
    targets = torch.from_numpy(labels)
    ledger.charge(
        s.mechanism(),
        "DP-SGD steps that train a classifier on private images, as a reference",
        query="dp-sgd classifier",
        steps=s.steps,
        l2_sensitivity=s.clipping_norm,
        expected_batch=s.batch,
    )
    last = time.monotonic()
    for step in range(s.steps):
        chosen = torch.from_numpy(poisson_sample(randomness, step, len(inputs), s.sampling_rate))

        def loss(part: slice, chosen: Tensor = chosen) -> Tensor:
            rows = chosen[part]
            return F.cross_entropy(
                classifier.logits(inputs[rows]), targets[rows].to(classifier.device), reduction="none"
            )

        clipped = engine.sum(loss, len(chosen), physical_batch=s.physical_batch)
        noisy = noisy_mean(
            clipped,
            noise_multiplier=s.noise_multiplier,
            expected_examples=s.batch,
            randomness=randomness,
            step=step,
        )
        for parameter, gradient in zip(engine.parameters, noisy, strict=True):
            parameter.grad = gradient
        optimizer.step()
        ema.update(classifier.module)
        if on_progress and time.monotonic() - last > 5:
            last = time.monotonic()
            on_progress(f"training a classifier by DP-SGD: step {step + 1:,} of {s.steps:,}")
    classifier.module.load_state_dict(ema.average)
