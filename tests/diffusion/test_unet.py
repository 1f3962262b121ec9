"""The network: sizes as stated, shapes, and no mixing of images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dpsyngen.diffusion.unet import SIZES, UNet, UNetSize, count_parameters, named_size
from dpsyngen.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "millions"),
    [("nano", 0.10), ("tiny", 0.11), ("small", 0.38), ("base", 1.9), ("paper-32", 1.9), ("large", 6.2), ("huge", 22.0)],
)
def test_sizes_are_as_documented(name, millions) -> None:
    assert count_parameters(UNet(name, 32, 1, 10)) / 1e6 == pytest.approx(millions, rel=0.05)


@pytest.mark.parametrize(("name", "millions"), [("nano", 0.10), ("tiny", 0.11), ("small", 0.38), ("base", 1.9)])
def test_sizes_at_28_pixels(name, millions) -> None:
    assert count_parameters(UNet(name, 28, 1, 10)) / 1e6 == pytest.approx(millions, rel=0.1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resolution", [8, 12, 16, 20, 28, 32, 48, 64])
@pytest.mark.parametrize("name", ["nano", "tiny", "small"])
def test_output_has_the_shape_of_the_input(name, resolution, channels) -> None:
    with torch.no_grad():
        out = UNet(name, resolution, channels)(torch.zeros(1, channels, resolution, resolution), torch.zeros(1))
    assert out.shape == (1, channels, resolution, resolution)


def test_every_size_runs_at_its_smallest_resolution() -> None:
    for size in SIZES.values():
        side = size.divisor
        with torch.no_grad():
            out = UNet(size, side, 1, 2)(torch.zeros(2, 1, side, side), torch.zeros(2), torch.tensor([0, 2]))
        assert out.shape == (2, 1, side, side)
        with pytest.raises(ConfigError, match=f"multiple of {side}"):
            UNet(size, side - 1, 1)


def attended(network: UNet) -> list[int]:
    """Resolutions, in pixels of the network's grid, at which some block of the way down attends."""
    size = network.size
    grid = network.resolution // size.patch
    return [
        grid >> (i // size.blocks)
        for i, block in enumerate(network.down)
        if not isinstance(block.attention, nn.Identity)
    ]


def test_attention_is_where_the_published_networks_have_it() -> None:
    assert attended(UNet("base", 28, 1)) == [7, 7]
    assert attended(UNet("paper-32", 32, 3)) == [16, 16]
    assert attended(UNet("nano", 32, 3)) == []


def test_every_size_is_tested() -> None:
    assert set(SIZES) == {"nano", "tiny", "small", "base", "paper-32", "large", "huge", "prior"}


@pytest.mark.parametrize(
    ("name", "resolution", "channels", "classes"),
    [
        ("nano", 8, 1, 10),
        ("nano", 10, 3, 0),
        ("tiny", 28, 1, 3),
        ("tiny", 64, 3, 0),
        ("small", 12, 3, 2),
        ("small", 28, 1, 0),
    ],
)
def test_shapes_and_gradients(name, resolution, channels, classes) -> None:
    torch.manual_seed(0)
    network = UNet(name, resolution, channels, classes)
    x = torch.randn(2, channels, resolution, resolution)
    out = network(x, torch.tensor([-1.0, 0.5]), torch.tensor([0, classes]) if classes else None)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


@pytest.mark.parametrize(
    "size", ["nano", UNetSize(16, (1, 2), 1, None, 32, patch=2), UNetSize(16, (1, 2, 2), 2, (8, 4))]
)
def test_images_do_not_mix(size) -> None:
    torch.manual_seed(0)
    network = UNet(size, 16, 1, 3).double()
    for p in network.parameters():
        p.data += 0.05 * torch.randn_like(p)
    x, c, y = torch.randn(4, 1, 16, 16).double(), torch.randn(4).double(), torch.tensor([0, 1, 2, 3])
    out = network(x, c, y)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(network(x[order], c[order], y[order]), out[order])
    changed = x.clone()
    changed[1] += 5
    after = network(changed, c, y)
    torch.testing.assert_close(after[[0, 2, 3]], out[[0, 2, 3]])
    assert not torch.allclose(after[1], out[1])
    # Noise level and class are heard.
    assert not torch.allclose(network(x, c + 0.5, y), out)
    assert not torch.allclose(network(x, c, y.flip(0)), out)


def test_bad_sizes() -> None:
    with pytest.raises(ConfigError, match="--resolution 28 or 32"):
        UNet("small", 30, 1)
    with pytest.raises(ConfigError, match="multiple of 4"):
        UNet("tiny", 9, 1)
    with pytest.raises(ConfigError, match="nano, tiny"):
        named_size("vast")
    with pytest.raises(ConfigError, match="class-conditional"):
        UNet("nano", 8, 1, 3)(torch.zeros(1, 1, 8, 8), torch.zeros(1))
