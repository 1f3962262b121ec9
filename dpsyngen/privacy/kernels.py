"""Ways to get the weight gradient of a convolution for each example, and the choice among them.

Which one is fastest depends on channels, positions, copies, threads and library; the spread is more than twofold
either way.  So the engine measures the candidates the first time it meets a layer, remembers what won, and shows it
(``KernelChoices``).  All of them compute the same sums, in other orders: results agree to rounding.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dpsyngen.errors import require
from dpsyngen.privacy.contributions import Contribution, Dense, Pieces, at_least_fp32, blanked, ghost_norms

_ONLY_WEIGHT = [False, True, False]


def each_axis(value: int | tuple[int, ...] | list[int], dims: int) -> list[int]:
    """A setting for each of `dims` axes."""
    return [value] * dims if isinstance(value, int) else list(value) * (dims if len(value) == 1 else 1)


@dataclass(frozen=True)
class Convolution:
    """The settings of a convolution besides its tensors, as ATen wants them."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    transposed: bool = False
    output_padding: list[int] = field(default_factory=lambda: [0, 0])

    @property
    def _steps(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.transposed, self.output_padding

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output."""
        arguments: list[Any] = [x, weight, bias, *self._steps, self.groups]
        return torch.convolution(*arguments)

    def backward(self, g: Tensor, x: Tensor, weight: Tensor, groups: int, mask: list[bool]) -> Any:
        """Gradients of (input, weight, bias) as `mask` asks."""
        return torch.ops.aten.convolution_backward(g, x, weight, None, *self._steps, groups, mask)

    @property
    def dense_steps(self) -> bool:
        """Whether it is an ordinary convolution with stride, dilation and groups 1."""
        return not self.transposed and self.groups == 1 and {*self.stride, *self.dilation} == {1}


@dataclass(frozen=True)
class ConvolutionCall:
    """One backward pass through a convolution of `examples` with `copies` rows each.

    g is the gradient of the output, [examples*copies, C_out, *spatial], x the input, [examples*copies, C_in, *spatial];
    of the weight only the shape matters.
    """

    g: Tensor
    x: Tensor
    weight: Tensor
    settings: Convolution
    examples: int
    copies: int

    def signature(self) -> str:
        """What the speed depends on, but for the number of examples."""
        s = self.settings

        def size(values: Any) -> str:
            return "x".join(str(v) for v in values)

        return (
            f"{'transposed ' if s.transposed else ''}{size(self.weight.shape)} on {size(self.x.shape[2:])}"
            f" stride {size(s.stride)} padding {size(s.padding)} dilation {size(s.dilation)} groups {s.groups}"
            f" copies {self.copies} {str(self.g.dtype).removeprefix('torch.')} {self.g.device.type}"
        )


# ---------------------------------------------------------------------------------------------- kernels


def _grouped(g: Tensor, x: Tensor, call: ConvolutionCall) -> Tensor:
    """One call for the examples in `g`: they become groups of channels, the copies become the batch."""
    copies, weight, groups = call.copies, call.weight, call.settings.groups
    examples = len(g) // copies
    if examples == 1:
        return call.settings.backward(g, x, weight, groups, _ONLY_WEIGHT)[1][None]

    def to_channels(t: Tensor) -> Tensor:
        if copies == 1:
            return t.reshape(1, examples * t.shape[1], *t.shape[2:])
        split = t.reshape(examples, copies, *t.shape[1:])
        return split.transpose(0, 1).reshape(copies, examples * t.shape[1], *t.shape[2:])

    # Only the shape of the repeated weight matters, so no memory is spent on its values.
    repeated = weight.new_empty(()).expand(examples * weight.shape[0], *weight.shape[1:])
    out = call.settings.backward(to_channels(g), to_channels(x), repeated, groups * examples, _ONLY_WEIGHT)[1]
    return out.reshape(examples, *weight.shape)


def _few_at_a_time(examples: int) -> Callable[[ConvolutionCall], Contribution]:
    """The library's weight gradient, called once for every few examples, whose data then stay in the cache."""

    def run(call: ConvolutionCall) -> Contribution:
        rows = examples * call.copies
        out = Pieces()
        for g, x in zip(call.g.split(rows), call.x.split(rows), strict=True):
            out.append(_grouped(g, x, call))
        return out

    return run


def _pointwise(call: ConvolutionCall) -> Contribution:
    """A 1x1 convolution is a matrix product of each row."""
    per_row = torch.bmm(call.g.flatten(2), call.x.flatten(2).transpose(1, 2))
    if call.copies > 1:
        per_row = per_row.view(call.examples, call.copies, *per_row.shape[1:]).sum(1)
    return Dense(per_row.view(call.examples, *call.weight.shape))


def _unfold(call: ConvolutionCall) -> Contribution:
    """Matrix products with the unfolded input: much memory, but few calls.

    ``F.unfold`` would start a kernel for each row on a GPU; a view of overlapping windows is copied by one.
    """
    s, (_, inputs, *kernel) = call.settings, call.weight.shape
    top, left = s.padding
    x = F.pad(call.x, (left, left, top, top)).reshape(call.examples, call.copies, inputs, -1)
    (down, right), width = s.dilation, call.x.shape[3] + 2 * left
    spatial = call.g.shape[2:]
    b, k, c, one = x.stride()
    # [examples, inputs, kernel rows and columns, copies, output rows and columns]
    sizes = (call.examples, inputs, *kernel, call.copies, *spatial)
    strides = (b, c, down * width * one, right * one, k, s.stride[0] * width * one, s.stride[1] * one)
    columns = x.as_strided(sizes, strides).reshape(call.examples, inputs * kernel[0] * kernel[1], -1)
    g = call.g.reshape(call.examples, call.copies, call.g.shape[1], -1).transpose(1, 2).flatten(2)
    return Dense(torch.bmm(g, columns.transpose(1, 2)).view(call.examples, -1, inputs, *kernel))


def _dot(call: ConvolutionCall) -> Contribution:
    from dpsyngen.privacy.dot_kernel import dot_products  # Numba loads when it is first used

    return Dense(dot_products(call.g, call.x, call.examples, call.copies))


class _Ghost(Contribution):
    """Norms from Gram matrices, the sum from one weight gradient of the whole batch with weighted rows."""

    def __init__(self, call: ConvolutionCall) -> None:
        # Of the weight only the shape matters: with no hold on its values FSDP can take their memory back.
        weight = call.weight.detach().new_empty(()).expand(call.weight.shape)
        self.call = replace(call, g=call.g.detach(), x=call.x.detach(), weight=weight)
        super().__init__(at_least_fp32(call.g[:0]))

    def squared_norms(self, wide: bool = False) -> Tensor:
        """‖Σ_t g_t x_{t+τ}ᵀ‖², summed over taps τ, is Σ_{t,s} <g_t, g_s> Σ_τ <x_{t+τ}, x_{s+τ}>."""
        call, dtype = self.call, torch.float64
        height, width = call.weight.shape[2:]
        out_h, out_w = call.g.shape[2:]

        def gram(t: Tensor) -> Tensor:
            """[B, K, h, w, K, h, w] inner products over channels of all pairs of positions."""
            k, (h, w) = call.copies, t.shape[2:]
            flat = t.to(dtype).reshape(call.examples, k, -1, h * w).transpose(1, 2).flatten(2)
            return torch.bmm(flat.transpose(1, 2), flat).view(call.examples, k, h, w, k, h, w)

        # 1. Gram matrices of gradients and inputs over all pairs of positions.
        g, x = gram(call.g), gram(call.x)
        top, left = call.settings.padding
        x = F.pad(x, (left, left, top, top, 0, 0, left, left, top, top))
        # 2. That of the inputs, shifted by each tap of the kernel, added up over taps.
        taps = torch.zeros_like(g)
        for i in range(height):
            for j in range(width):
                rows, columns = slice(i, i + out_h), slice(j, j + out_w)
                taps += x[:, :, rows, columns][..., rows, columns]
        # 3. The norm, and what it would be if no terms cancelled (the product of the traces).
        side = round(g[0].numel() ** 0.5)
        traces = [each.reshape(-1, side, side).diagonal(dim1=1, dim2=2).sum(1) for each in (g, taps)]
        bound = traces[0] * traces[1]
        return ghost_norms((g * taps).flatten(1).sum(1), bound, at_least_fp32(call.g).dtype)

    def weighted_sum(self, factors: Tensor, kept: Tensor | None = None) -> Tensor:
        call = self.call
        k = call.copies
        rows = None if kept is None else kept.repeat_interleave(k)
        g, x = (blanked(at_least_fp32(t), rows) for t in (call.g, call.x))
        weighted = g * factors.to(g.dtype).repeat_interleave(k).view(-1, 1, 1, 1)
        out: Tensor = call.settings.backward(weighted, x, call.weight.to(g.dtype), 1, _ONLY_WEIGHT)[1]
        return out

    def dense(self) -> Tensor:
        return Dense(_grouped(self.call.g, self.call.x, self.call)).dense()


# ------------------------------------------------------------------------------------------ which may be used


def _is_pointwise(call: ConvolutionCall) -> bool:
    s = call.settings
    return s.dense_steps and all(k == 1 for k in call.weight.shape[2:]) and all(p == 0 for p in s.padding)


def _may_dot(call: ConvolutionCall) -> bool:
    return (
        call.settings.dense_steps
        and tuple(call.weight.shape[2:]) == (3, 3)
        and call.settings.padding == [1, 1]
        and call.g.device.type == "cpu"
        and call.g.dtype == call.x.dtype == torch.float32
    )


def _may_ghost(call: ConvolutionCall) -> bool:
    """Possible, and not absurdly more work than the gradients themselves."""
    if not call.settings.dense_steps or call.weight.dim() != 4:
        return False
    time_, (outputs, inputs, *kernel) = call.copies * call.g[0, 0].numel(), call.weight.shape
    return 2 * time_ * (outputs + inputs) < outputs * inputs * kernel[0] * kernel[1]


def _may_unfold(call: ConvolutionCall) -> bool:
    s = call.settings
    return call.weight.dim() == 4 and s.groups == 1 and not s.transposed


class Kernel(NamedTuple):
    """A way to compute, and where it is possible."""

    run: Callable[[ConvolutionCall], Contribution]
    possible: Callable[[ConvolutionCall], bool]


KERNELS = {
    "pointwise": Kernel(_pointwise, _is_pointwise),
    "dot": Kernel(_dot, _may_dot),
    "each": Kernel(_few_at_a_time(1), lambda call: True),
    "by-4": Kernel(_few_at_a_time(4), lambda call: call.examples > 4),
    "groups": Kernel(lambda call: Dense(_grouped(call.g, call.x, call)), lambda call: True),
    "unfold": Kernel(_unfold, _may_unfold),
    "ghost": Kernel(_Ghost, _may_ghost),
}


def fixed_choice(call: ConvolutionCall) -> str:
    """What is usually best, from shapes alone: the same on every machine and in every run."""
    if _is_pointwise(call):
        return "pointwise"
    if call.g.device.type != "cpu":
        return "unfold" if _may_unfold(call) else "groups"  # at worst 1.9 times the other's time; that, 30 times
    positions = call.g[0, 0].numel()
    if _may_dot(call) and call.copies == 1 and positions >= 512:
        return "dot"
    return "each" if call.copies * positions >= 512 else "groups"


# Not worth measuring: 2 to 13 times the plain weight gradient wherever it was measured on a CPU; on a GPU, a call for
# every few examples leaves most of it idle.
_SLOW = {"cpu": {"unfold"}, "cuda": {"each", "by-4"}}


class KernelChoices:
    """Which kernel each layer uses (``chosen``), and what each candidate took (``milliseconds``), by layer signature.

    With `measure` it is measured on first use, otherwise :func:`fixed_choice`.  Choices of an earlier process are kept:
    a resumed run then adds in the same order and repeats a step bit for bit.
    """

    def __init__(self, measure: bool = True, chosen: dict[str, str] | None = None) -> None:
        self.measure = measure
        self.chosen: dict[str, str] = dict(chosen or {})
        self.milliseconds: dict[str, dict[str, float]] = {}
        self._lock = threading.Lock()
        for name in self.chosen.values():
            require(name in KERNELS, "a kernel", name, KERNELS)

    def run(self, call: ConvolutionCall) -> Contribution:
        """The weight gradients of the examples, by the kernel chosen for such layers."""
        signature = call.signature()
        if signature not in self.chosen:
            with self._lock:  # the first thread measures, the others wait for its choice
                if signature not in self.chosen:
                    name = self._measured(signature, call) if self.measure else fixed_choice(call)
                    self.chosen[signature] = name
        kernel = KERNELS[self.chosen[signature]]
        if not kernel.possible(call):  # a shorter batch, or a choice made elsewhere
            kernel = KERNELS[fixed_choice(call)]
        return kernel.run(call)

    def _measured(self, signature: str, call: ConvolutionCall) -> str:
        """The fastest candidate on random numbers of the same shapes; the real tensors are not looked at."""
        generator = torch.Generator(call.g.device).manual_seed(0)
        g, x = (torch.empty_like(t).normal_(generator=generator) for t in (call.g, call.x))
        trial = replace(call, g=g, x=x)
        factors = torch.ones(call.examples, device=call.g.device)
        slow = _SLOW.get(call.g.device.type, set())
        candidates = {name: k for name, k in KERNELS.items() if k.possible(call) and name not in slow}

        def seconds(kernel: Kernel) -> float:
            begin = _now(call.g.device)
            contribution = kernel.run(trial)
            contribution.squared_norms()
            contribution.weighted_sum(factors)
            return _now(call.g.device) - begin

        with torch.no_grad():
            # Twice each, the first to warm up; what is twice as slow as the best is out, the rest run four times more.
            first = {name: min(seconds(k), seconds(k)) for name, k in candidates.items()}
            times = {name: [t] for name, t in first.items() if t < 2 * min(first.values())}
            for _ in range(4):
                for name in times:
                    times[name].append(seconds(candidates[name]))
        medians = {name: statistics.median(t) for name, t in times.items()}
        self.milliseconds[signature] = {n: 1e3 * medians.get(n, t) for n, t in first.items()}
        return min(medians, key=lambda n: medians[n])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
