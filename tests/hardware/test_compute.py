"""How a choice is used, on the CPU of this machine."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from dpsyngen.config import ComputeConfig
from dpsyngen.diffusion.denoiser import NetworkDenoiser
from dpsyngen.diffusion.sampling import SamplingSettings
from dpsyngen.diffusion.unet import SIZES, UNet
from dpsyngen.errors import ConfigError
from dpsyngen.hardware import Compute, choose, send
from dpsyngen.privacy.kernels import KernelChoices
from dpsyngen.privacy.per_example import PerExampleGradients
from dpsyngen.training.checkpoint import save_file
from tests.tf32 import tf32_allowed

CPU = choose("cpu")


def network(size: str = "nano", resolution: int = 16) -> NetworkDenoiser:
    torch.manual_seed(0)
    return NetworkDenoiser(UNet(size, resolution, 1, 3), 3)


def rows(n: int, resolution: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 1, resolution, resolution, generator=g)
    return x, torch.rand(n, generator=g) + 0.5, torch.arange(n) % 3


def images(compute: Compute, denoiser: NetworkDenoiser) -> np.ndarray:
    with compute.autocast():
        (out,) = SamplingSettings(steps=4).draw(denoiser, (1, 16, 16), torch.arange(4) % 3, 4)
    return out.numpy()


def test_on_a_cpu_nothing_changes_by_a_bit() -> None:
    expected = images(CPU, network())
    denoiser = network()
    assert CPU.prepare(denoiser) is denoiser
    assert CPU.compiled(denoiser) is denoiser
    assert denoiser._compiled_call_impl is None
    assert np.array_equal(images(CPU, denoiser), expected)
    before = tf32_allowed()
    with CPU.autocast():
        assert tf32_allowed() == before
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("size", sorted(SIZES))
def test_channels_last_changes_the_layout_and_not_the_network(size) -> None:
    resolution = 16
    plain = network(size, resolution).eval()
    moved = choose("cpu", ComputeConfig(channels_last=True)).prepare(network(size, resolution)).eval()
    assert any(p.dim() == 4 and not p.is_contiguous() for p in moved.parameters())
    assert list(moved.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        assert torch.allclose(moved(*rows(2)), plain(*rows(2)), atol=1e-5)


def test_per_example_gradients_do_not_depend_on_the_layout() -> None:
    x, sigma, labels = rows(3)

    def sums(denoiser: torch.nn.Module) -> torch.Tensor:
        engine = PerExampleGradients(denoiser, 0.1, kernels=KernelChoices(measure=False), workers=1)
        clipped = engine(lambda: denoiser(x, sigma, labels).square().mean((1, 2, 3)), 3)
        return torch.cat([s.flatten() for s in clipped.sums])

    moved = choose("cpu", ComputeConfig(channels_last=True)).for_dp_steps().prepare(network())
    assert torch.allclose(sums(moved), sums(network()), atol=1e-6)


def test_files_have_the_plain_layout(tmp_path) -> None:
    from safetensors.torch import load_file

    moved = choose("cpu", ComputeConfig(channels_last=True)).prepare(network())
    save_file(moved.state_dict(), tmp_path / "moved")
    save_file(network().state_dict(), tmp_path / "plain")
    assert (tmp_path / "moved").read_bytes() == (tmp_path / "plain").read_bytes()
    assert all(t.is_contiguous() for t in load_file(tmp_path / "moved").values())
    moved.load_state_dict(load_file(tmp_path / "plain"))
    assert any(p.dim() == 4 and not p.is_contiguous() for p in moved.parameters())


def test_bf16_denoises_nearly_the_same() -> None:
    low = choose("cpu", ComputeConfig(precision="bf16"))
    with low.autocast():
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") is torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")
    denoiser, given = network().eval(), rows(4)
    for parameter in denoiser.parameters():  # as if trained: the last layers start at almost nothing
        parameter.data += 0.05 * torch.randn_like(parameter)
    with torch.no_grad():
        exact = denoiser(*given)
        with low.autocast():
            rounded = denoiser(*given)
    assert rounded.dtype is torch.float32
    assert 0 < (rounded - exact).abs().max() <= 0.05 * (exact - given[0]).abs().max()


@pytest.mark.parametrize("allowed", [False, True])
def test_a_gpu_allows_tf32_only_where_it_was_chosen(allowed) -> None:
    # The switches exist without a GPU, too.
    gpu = replace(CPU, device="cuda:0", precision="tf32" if allowed else "fp32", allowed=("fp32", "tf32", "bf16"))
    before = tf32_allowed()
    with gpu.autocast():
        assert tf32_allowed() == (allowed, allowed)
    assert tf32_allowed() == before


def test_what_dp_steps_computed_with_can_be_taken_up_again() -> None:
    low = choose("cpu", ComputeConfig(precision="bf16")).for_dp_steps()
    dp = CPU.for_dp_steps()
    assert dp.pinned(dp.pins()) is dp
    again = dp.pinned(low.pins())
    assert again.pins() == low.pins()
    assert "first session" in again.reasons["precision"]
    for pins, message in (
        ({"device": "cuda", "precision": "fp32", "channels_last": False}, "use --device cuda"),
        ({"device": "cpu", "precision": "tf32", "channels_last": False}, "has fp32, bf16 only"),
        ({"device": "cpu", "precision": "fp32"}, "'fp32'"),
        ({}, "None"),
    ):
        with pytest.raises(ConfigError, match=message):
            dp.pinned(pins)


@pytest.fixture
def by_name(monkeypatch) -> Compute:
    """Compiles with a backend that runs the traced graph as it is, which takes no compiler and little time."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: real(self, backend="eager"))
    return choose("cpu", ComputeConfig(compile=True))


def test_a_compiled_module_stays_itself_and_one_that_trains_stays_plain_on_a_cpu(by_name) -> None:
    plain, made = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    made.load_state_dict(plain.state_dict())
    assert by_name.compiled(made, trains=True) is made
    assert made._compiled_call_impl is None
    assert by_name.compiled(made) is made
    assert made._compiled_call_impl is not None
    assert list(made.state_dict()) == list(plain.state_dict())
    assert torch.equal(made(torch.ones(4, 3)), plain(torch.ones(4, 3)))
    assert copy.deepcopy(made)._compiled_call_impl is None


def test_the_engine_of_per_example_gradients_sees_through_compiled_code(by_name) -> None:
    """It learns gradients from the functions that a network calls, which compiled code would hide."""
    x = torch.ones(4, 3)

    def sums(network: torch.nn.Module) -> list[torch.Tensor]:
        return PerExampleGradients(network, 1.0, workers=1)(lambda: network(x).square().sum(1), 4).sums

    plain = torch.nn.Linear(3, 2)
    expected, made = sums(plain), by_name.compiled(copy.deepcopy(plain))
    made(x)
    assert all(torch.equal(a, b) for a, b in zip(sums(made), expected, strict=True))


def test_arrays_may_be_overwritten_once_they_were_sent() -> None:
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    sent = send(array, "cpu")
    array[:] = 0
    assert sent.tolist() == np.arange(12).reshape(3, 4).tolist()
    sent += 1  # nor the other way round
    assert array.max() == 0
    array.flags.writeable = False
    assert send(array[::-1, ::2], "cpu").shape == (3, 2)  # read-only, and no layout that PyTorch has
    assert send(np.zeros((0, 3), np.int64), "cpu").shape == (0, 3)
