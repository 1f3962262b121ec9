"""Drawing, training and transfer on a device agree with the CPU in fp32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dpsyngen.config import ComputeConfig, load_config
from dpsyngen.diffusion.denoiser import NetworkDenoiser
from dpsyngen.diffusion.loss import NoiseLevels, NoisyBatch, denoising_loss, make_noisy
from dpsyngen.diffusion.sampling import SamplingSettings
from dpsyngen.diffusion.unet import UNet
from dpsyngen.full_precision import full_precision, tf32
from dpsyngen.hardware import Compute, choose, kind_of, send
from dpsyngen.workers import Workers, summed_gradients


def denoiser() -> NetworkDenoiser:
    """The same each time, and not almost the identity."""
    torch.manual_seed(0)
    unet = UNet("nano", 16, 1, 3)
    with torch.no_grad():
        for p in unet.parameters():
            p += 0.02 * torch.randn_like(p)
    return NetworkDenoiser(unet, 3)


def batch(compute: Compute) -> NoisyBatch:
    rng = np.random.default_rng(0)
    return make_noisy(
        send(rng.integers(0, 256, (8, 1, 16, 16), dtype=np.uint8), compute.device) / 127.5 - 1,
        send(np.arange(8) % 3, compute.device),
        NoiseLevels(-0.5, 1.0),
        copies=2,
        num_classes=3,
        label_dropout=0.1,
        generator=torch.Generator().manual_seed(0),
    )


def gradients(compute: Compute, network: NetworkDenoiser) -> Tensor:
    given = batch(compute)
    with compute.autocast():
        out, _ = summed_gradients(
            list(network.parameters()),
            lambda part: denoising_loss(network, given.rows(slice(2 * part.start, 2 * part.stop))),
            8,
            Workers(1),
        )
    return torch.cat([g.flatten() for g in out]).double().cpu()


def test_the_choice_is_one_that_works(compute) -> None:
    automatic = choose()
    assert automatic.kind == kind_of("auto")
    assert (load_config().preset == "gpu") == (automatic.kind == "cuda")
    assert send(np.ones(3), compute.device).sum() == 3


def test_arrays_arrive_whole_whatever_happens_to_the_buffer(compute) -> None:
    """Hundreds of transfers through one buffer, which is overwritten while they may still be under way."""
    buffer = np.empty(1 << 16, np.int32)
    sent = []
    for value in range(300):
        buffer[:] = value
        sent.append(send(buffer, compute.device))
    buffer[:] = -1
    for value, tensor in enumerate(sent):
        assert tensor.device.type == compute.kind
        assert int(tensor.min()) == int(tensor.max()) == value


def test_public_gradients_agree_with_those_of_a_cpu(compute) -> None:
    agree(compute, compiled=False)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch can use: `dpsyngen doctor` says why")
def test_compiled_networks_agree_too() -> None:
    agree(choose("cuda"), compiled=True)


def agree(compute: Compute, compiled: bool) -> None:
    expected = gradients(choose("cpu"), denoiser())
    for precision in compute.allowed:
        own = choose(compute.device, ComputeConfig(precision=precision, compile=compiled))
        network = own.prepare(denoiser())
        own.compiled(network, trains=True)
        got = gradients(own, network)
        limit = {"fp32": 1e-4, "tf32": 0.01, "bf16": 0.05}[precision]
        assert (got - expected).norm() <= limit * expected.norm(), precision


@pytest.mark.parametrize("last", [False, True])
def test_images_agree_with_those_of_a_cpu(compute, last) -> None:
    def images(own: Compute) -> np.ndarray:
        network = own.prepare(denoiser()).eval()
        with own.autocast():
            (out,) = SamplingSettings(steps=8).draw(network, (1, 16, 16), torch.arange(6) % 3, 6, device=own.device)
        return out.numpy().astype(int)

    expected = images(choose("cpu"))
    for precision in compute.allowed:
        difference = np.abs(
            images(choose(compute.device, ComputeConfig(precision=precision, channels_last=last))) - expected
        )
        # Of 255; an untrained network amplifies differences, so a few pixels may be further off.
        assert np.mean(difference) <= (0.05 if precision == "fp32" else 3), precision


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="no GPU of compute capability 8.0 or later, which TF32 needs",
)
def test_tf32_is_what_the_switches_say() -> None:
    """Products of fp32 numbers are coarse where that is allowed, and fp32 where it is not."""
    g = torch.Generator("cuda").manual_seed(0)
    a, b = torch.randn(2, 512, 512, device="cuda", generator=g)
    # Large enough that cuDNN takes its TF32 kernels: for small convolutions it may keep to fp32.
    x = torch.randn(16, 128, 32, 32, device="cuda", generator=g)
    w = torch.randn(128, 128, 3, 3, device="cuda", generator=g)
    exact = [a.double() @ b.double(), torch.conv2d(x.double(), w.double())]

    def errors() -> list[float]:
        got = [a @ b, torch.conv2d(x, w)]
        return [float((y.double() - e).norm() / e.norm()) for y, e in zip(got, exact, strict=True)]

    with tf32(True):
        assert min(errors()) > 1e-4
        with full_precision("cuda"):
            assert max(errors()) < 1e-5
    with tf32(False):
        assert max(errors()) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch can use: `dpsyngen doctor` says why")
def test_sending_does_not_wait_for_the_device() -> None:
    """Kernels that were asked for before a transfer have not ended when `send` returns."""
    a = torch.randn(4096, 4096, device="cuda")
    array = np.zeros(1 << 10, np.uint8)
    send(array, "cuda")  # the first page-locked memory is slow to get
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    for _ in range(50):
        a = a @ a / 64
    done.record()
    sent = send(array, "cuda")
    assert not done.query()
    torch.cuda.synchronize()
    assert not sent.any()
