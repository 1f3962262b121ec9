"""How one process computes: what was chosen, why, and how to use it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from dpsyngen.errors import ConfigError
from dpsyngen.full_precision import tf32
from dpsyngen.hardware.compiling import compiled
from dpsyngen.transfer import send

Precision = Literal["fp32", "tf32", "bf16"]

_Target = TypeVar("_Target", bound=Callable[..., Any])
_WORDS = {
    "device": "device",
    "precision": "precision",
    "dp_precision": "precision of DP-SGD steps",
    "channels_last": "channels last",
    "dp_channels_last": "channels last in DP-SGD steps",
    "compile": "compiled networks",
    "dp_compile": "compiled DP-SGD steps",
}


@dataclass(frozen=True)
class Compute:
    """What :func:`dpsyngen.hardware.choose` chose, for drawing images and for training on programs.

    DP-SGD steps go by :meth:`for_dp_steps`, and so do public steps on a network that DP-SGD steps train as well.

    Attributes:
        device: "cpu" or "cuda:0", ….
        precision: of the products of a network: "fp32"; "tf32", 11 bits of significand in products of fp32 numbers;
            "bf16", autocast to 8 bits.
        channels_last: whether images lie in memory with their channels innermost.
        compile: whether networks are compiled.
        reasons: why, by the names of the other attributes (and ``dp_compile``).
        allowed: the precisions that this device has.
        dp_precision: of networks in DP-SGD steps.
        dp_channels_last: whether they have their channels innermost.
        compile_after: calls of a network that are not compiled yet: compiling takes up to a minute, so a network that
            is called a few times only is better off without.
    """

    device: str
    precision: Precision
    channels_last: bool
    compile: bool
    reasons: dict[str, str] = field(hash=False)
    allowed: tuple[Precision, ...] = ("fp32",)
    dp_precision: Precision = "fp32"
    dp_channels_last: bool = False
    compile_after: int = 0

    @property
    def kind(self) -> str:
        """The device without its number: "cpu" or "cuda"."""
        return self.device.partition(":")[0]

    # ---------------------------------------------------------------------------------------- DP-SGD steps

    def for_dp_steps(self) -> Compute:
        """How DP-SGD steps compute.

        Not compiled: the engine learns per-example gradients from the functions that a network calls
        (``dpsyngen.privacy.recording``, a TorchFunctionMode), and compiled code calls none.
        """
        return replace(
            self,
            precision=self.dp_precision,
            channels_last=self.dp_channels_last,
            compile=False,
            reasons=self.reasons
            | {
                k: self.reasons[f"dp_{k}"]
                for k in ("precision", "channels_last", "compile")
                if f"dp_{k}" in self.reasons
            },
        )

    def pins(self) -> dict[str, Any]:
        """What must be the same whenever a step is taken again, as it rounds the sums that noise is added to.

        To be kept before the noise of a first step is used, and given to :meth:`pinned` when a run goes on.
        """
        return {"device": self.kind, "precision": self.precision, "channels_last": self.channels_last}

    def pinned(self, pins: dict[str, Any]) -> Compute:
        """This machine's way to compute what an earlier session computed.

        Args:
            pins: of that session, see :meth:`pins`.

        Raises:
            ConfigError: it cannot.
        """
        if self.pins() == pins:
            return self
        device, precision, channels_last = pins.get("device"), pins.get("precision"), pins.get("channels_last")
        if device != self.kind:
            raise ConfigError(
                f"it computed on {device!r}, and this session would on {self.kind!r}: use --device {device}"
            )
        if precision not in self.allowed or not isinstance(channels_last, bool):
            raise ConfigError(
                f"it computed in {precision!r}, but {self.device} here has {', '.join(self.allowed)} only: go on with "
                "a device like the one that it was begun on"
            )
        why = "as in the run's first session: steps that are taken again must round the same way"
        changed = {k: why for k in ("precision", "channels_last") if getattr(self, k) != pins[k]}
        return replace(self, precision=precision, channels_last=channels_last, reasons=self.reasons | changed)

    # ------------------------------------------------------------------------------------------------- use

    def prepare(self, module: nn.Module) -> nn.Module:
        """Move a module to the device, and its convolutions to the memory format; returns the same module.

        Images follow the format of the weights that they meet.  Call it before optimizers and averages are made.
        """
        module = module.to(self.device)
        # As it is now where nothing was chosen: the bits of a result follow the format.
        if self.channels_last:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Within, networks compute in the precision that was chosen.

        bf16: PyTorch's autocast.  Enter it anew for each training step: it keeps casts of weights until it is left.  On
        a GPU TF32 is allowed or forbidden, too, for the whole process; PyTorch itself allows it for convolutions.  On a
        CPU in fp32 nothing is changed.
        """
        with contextlib.ExitStack() as stack:
            if self.kind == "cuda":
                stack.enter_context(tf32(self.precision == "tf32"))
            if self.precision == "bf16":
                stack.enter_context(torch.autocast(self.kind, torch.bfloat16))
            yield

    def compiled(self, target: _Target) -> _Target:
        """A network or function that is compiled where that was chosen, after ``compile_after`` calls; see
        :func:`dpsyngen.hardware.compiling.compiled`.

        A module is changed in place and keeps the names of its parameters.
        """
        return compiled(target, self.compile_after) if self.compile else target

    def send(self, array: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
        """The array on the device, without waiting for it; see :func:`dpsyngen.transfer.send`."""
        return send(array, self.device, dtype)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Each choice with its ``value`` and ``why``, for programs."""
        dp = self.for_dp_steps()
        values = {
            "device": self.device,
            "precision": self.precision,
            "dp_precision": dp.precision,
            "channels_last": self.channels_last,
            "dp_channels_last": dp.channels_last,
            "compile": self.compile,
            "dp_compile": dp.compile,
        }
        return {name: {"value": value, "why": self.reasons.get(name, "")} for name, value in values.items()}

    def describe(self) -> list[tuple[str, str, str]]:
        """(what, value, why) of each choice, for people."""
        words = {True: "yes", False: "no"}
        return [
            (_WORDS[name], words.get(row["value"], row["value"]), row["why"]) for name, row in self.to_dict().items()
        ]
