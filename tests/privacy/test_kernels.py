"""Every way to compute a convolution's weight gradients gives the same gradients, norms and sums."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from dpsyngen.errors import ConfigError
from dpsyngen.privacy.kernels import KERNELS, Convolution, ConvolutionCall, KernelChoices
from dpsyngen.privacy.per_example import PerExampleGradients

EXAMPLES = 9  # more than the largest group of examples

CONVOLUTIONS = {
    "plain": (lambda: nn.Conv2d(4, 6, 3), (4, 10, 10)),
    "3x3 same": (lambda: nn.Conv2d(4, 7, 3, padding=1), (4, 9, 6)),
    "3x3 same, one channel": (lambda: nn.Conv2d(1, 1, 3, padding=1), (1, 5, 5)),
    "3x3 same, one position": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 1, 1)),
    "few positions": (lambda: nn.Conv2d(16, 24, 3, padding=1), (16, 2, 3)),
    "few positions, unpadded": (lambda: nn.Conv2d(16, 24, 2), (16, 3, 3)),
    "stride leaves a rest": (lambda: nn.Conv2d(4, 6, 3, stride=2), (4, 10, 10)),
    "stride 3, padding 2": (lambda: nn.Conv2d(4, 6, 3, stride=3, padding=2), (4, 11, 8)),
    "all at once": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (2, 1), (1, 3), 2), (4, 10, 10)),
    "same, dilated, even": (lambda: nn.Conv2d(4, 6, (2, 3), padding="same", dilation=(3, 2), groups=2), (4, 9, 7)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (4, 9, 9)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), (4, 6, 6)),
    "pointwise, groups": (lambda: nn.Conv2d(4, 6, 1, groups=2), (4, 6, 6)),
    "pointwise, padded": (lambda: nn.Conv2d(4, 6, 1, padding=1), (4, 6, 6)),
    "conv1d, stride, dilation, groups": (lambda: nn.Conv1d(4, 6, 3, 2, 1, 2, 2), (4, 20)),
    "conv1d, same, even": (lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=3), (4, 20)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3), (4, 5, 5)),
    "transposed, all at once": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), 2, 1, 1, 2, True, 2), (4, 5, 6)),
    "transposed 1-D": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1), (4, 9)),
}


class Only(KernelChoices):
    """Uses one kernel wherever it is possible, and counts where."""

    def __init__(self, name: str) -> None:
        super().__init__(measure=False)
        self.name, self.used = name, 0

    def run(self, call: ConvolutionCall):
        if not KERNELS[self.name].possible(call):
            return super().run(call)
        self.used += 1
        return KERNELS[self.name].run(call)


def weighted(out: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 1.5, out[0].numel(), dtype=out.dtype).view_as(out[0])
    return (out * weights).sin().flatten(1).sum(1)


def oracle(model: nn.Module, x: Tensor, copies: int) -> list[list[Tensor]]:
    """Gradients by plain autograd, one example at a time."""
    parameters = list(model.parameters())
    parts = x.split(copies)
    return [list(torch.autograd.grad(weighted(model(part)).mean(), parameters)) for part in parts]


USED: dict[str, int] = {}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_gradients_norms_and_sums_equal_the_oracle(name, kernel, copies, dtype, tolerance) -> None:
    torch.manual_seed(0)
    make, shape = CONVOLUTIONS[name]
    model = make().to(dtype)
    x = torch.randn(EXAMPLES * copies, *shape, dtype=dtype)
    expected = oracle(model, x, copies)
    choices = Only(kernel)
    engine = PerExampleGradients(model, 1.0, kernels=choices, workers=1)
    contributions = engine.contributions(lambda: weighted(model(x)), EXAMPLES, copies)
    USED[kernel] = USED.get(kernel, 0) + choices.used
    factors = torch.linspace(0.1, 2.0, EXAMPLES, dtype=dtype)
    for i, contribution in enumerate(contributions):
        each = torch.stack([gradients[i] for gradients in expected])
        scale = each.flatten(1).norm(dim=1)
        error = (contribution.dense() - each).flatten(1).norm(dim=1)
        assert (error <= tolerance * scale).all()
        torch.testing.assert_close(contribution.squared_norms().sqrt().to(dtype), scale, rtol=tolerance, atol=0)
        total = (each * factors.view(-1, *[1] * (each.dim() - 1))).sum(0)
        assert (contribution.weighted_sum(factors) - total).norm() <= tolerance * (scale * factors).sum()


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_was_put_to_the_test(kernel) -> None:
    if USED:  # empty if this test was run alone
        assert USED[kernel] > 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_stays_in_its_example(kernel) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1),
        nn.GroupNorm(1, 16),
        nn.SiLU(),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.Conv2d(24, 2, 1),
    )
    x = torch.randn(6, 2, 3, 3)
    engine = PerExampleGradients(model, 1.0, kernels=Only(kernel), workers=1)
    others = [0, 1, 3, 4, 5]
    clean = engine(lambda: weighted(model(x[others])), 5)
    for bad in (float("nan"), float("inf")):
        x[2, 1, 1, 1] = bad
        dirty = engine(lambda: weighted(model(x)), 6)
        assert dirty.not_finite == 1
        for a, b in zip(clean.sums, dirty.sums, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradient_that_cancels_is_not_underestimated() -> None:
    """Gram matrices lose a gradient that is a small difference of large terms; its contribution must stay within C."""
    torch.manual_seed(0)
    x = torch.randn(3, 64, 2, 2) * 1e6
    x[:, :, 1] = -x[:, :, 0] * (1 + 1e-7 * torch.randn(3, 64, 2))
    g = torch.randn(3, 64, 1, 1).expand(3, 64, 2, 2).contiguous() * 1e6
    weight = torch.zeros(64, 64, 1, 1)
    call = ConvolutionCall(g, x, weight, Convolution([1, 1], [0, 0], [1, 1], 1), 3, 1)
    ghost = KERNELS["ghost"].run(call)
    factors = 1 / ghost.squared_norms().sqrt()
    for b in range(3):
        alone = torch.zeros(3)
        alone[b] = factors[b]
        assert ghost.weighted_sum(alone).norm() <= 1.0 + 1e-3


def make_call(examples: int = 4, dtype: torch.dtype = torch.float32) -> ConvolutionCall:
    x = torch.randn(examples, 3, 8, 8, dtype=dtype)
    weight = torch.randn(5, 3, 3, 3, dtype=dtype)
    settings = Convolution([1, 1], [1, 1], [1, 1], 1)
    return ConvolutionCall(settings.forward(x, weight, None), x, weight, settings, examples, 1)


def test_choice_is_measured_once_and_kept() -> None:
    choices = KernelChoices()
    call = make_call()
    choices.run(call)
    (signature,) = choices.chosen
    assert "5x3x3x3 on 8x8" in signature
    assert "copies 1" in signature
    times = choices.milliseconds[signature]
    assert {"each", "groups", "dot"} <= set(times)
    assert choices.chosen[signature] in times
    choices.milliseconds.clear()
    choices.run(make_call(examples=2))  # another number of examples is the same layer
    assert not choices.milliseconds
    again = KernelChoices(chosen=choices.chosen)
    again.run(call)
    assert again.chosen == choices.chosen
    assert not again.milliseconds


def test_measuring_leaves_the_callers_random_numbers_alone() -> None:
    call = make_call()
    state = torch.get_rng_state()
    KernelChoices().run(call)
    assert torch.equal(torch.get_rng_state(), state)


def test_fixed_choices_measure_nothing_and_unknown_ones_are_refused() -> None:
    choices = KernelChoices(measure=False)
    choices.run(make_call())
    assert not choices.milliseconds
    with pytest.raises(ConfigError, match="must be one of pointwise"):
        KernelChoices(chosen={"x": "warp"})


def test_choice_that_does_not_fit_is_replaced_by_one_that_does() -> None:
    call = make_call(dtype=torch.float64)
    choices = KernelChoices(chosen={call.signature(): "dot"})  # fp32 only
    torch.testing.assert_close(choices.run(call).dense(), KERNELS["each"].run(call).dense())


def test_threads_measure_a_layer_once() -> None:
    choices = KernelChoices()
    counted = []
    measured = choices._measured

    def count(signature: str, call: ConvolutionCall) -> str:
        counted.append(signature)
        return measured(signature, call)

    choices._measured = count  # type: ignore[method-assign]
    call = make_call()
    threads = [threading.Thread(target=choices.run, args=(call,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(counted) == 1
