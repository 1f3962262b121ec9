"""Checkpoints: everything that a resumed run needs to go on exactly, in one safetensors file.

No random state is saved but the step number: all randomness is keyed by step (see ``privacy.randomness``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dpsyngen.diffusion.ema import Ema
from dpsyngen.errors import RunError
from dpsyngen.files import write_atomically


@dataclass
class TrainState:
    """What changes while a network trains.

    Attributes:
        module: the network.
        ema: its moving average.
        optimizers: by name; a shared network has one for public and one for private steps.
        step: steps done.
    """

    module: nn.Module
    ema: Ema
    optimizers: dict[str, torch.optim.Optimizer]
    step: int = 0
    _parameters: list[nn.Parameter] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._parameters = list(self.module.parameters())

    def tensors(self) -> dict[str, Tensor]:
        """Everything, by name."""
        out = {f"model/{k}": v for k, v in self.module.state_dict().items()}
        out |= {f"ema/{k}": v for k, v in self.ema.average.items()}
        for name, optimizer in self.optimizers.items():
            for i, p in enumerate(self._parameters):
                for key, value in optimizer.state.get(p, {}).items():
                    out[f"optimizer/{name}/{i}/{key}"] = torch.as_tensor(value)
        return {k: v.detach().contiguous() for k, v in out.items()}

    def restore(self, tensors: dict[str, Tensor], step: int, ema_steps: int) -> None:
        """The inverse of :meth:`tensors`."""
        self.step, self.ema.steps = step, ema_steps
        self.module.load_state_dict(_under(tensors, "model/"))
        device = self._parameters[0].device
        self.ema.average = {k: v.to(device) for k, v in _under(tensors, "ema/").items()}
        for name, optimizer in self.optimizers.items():
            for key, value in _under(tensors, f"optimizer/{name}/").items():
                index, entry = key.split("/")
                # Adam keeps its step count on the CPU.
                optimizer.state[self._parameters[int(index)]][entry] = value if entry == "step" else value.to(device)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


class Checkpoints:
    """The last two checkpoints of a run; the older one is the fallback if the newer one is damaged.

    Args:
        folder: the run's private folder.
    """

    def __init__(self, folder: Path) -> None:
        self.newest, self.older = (
            folder / "checkpoint.safetensors",
            folder / "checkpoint-previous.safetensors",
        )
        self.damaged: list[str] = []

    def save(self, phase: str, state: TrainState) -> None:
        """Write the state of `phase`; the one before is kept until the next."""
        metadata = {"dpsyngen": json.dumps({"phase": phase, "step": state.step, "ema_steps": state.ema.steps})}
        if self.newest.exists():
            self.newest.replace(self.older)
        write_atomically(self.newest, lambda p: save_file(state.tensors(), p, metadata), 0o600)

    def load(self, phase: str, state: TrainState) -> bool:
        """Restore `state` from the newest readable checkpoint of `phase`; False if there is none.

        A phase without a checkpoint starts at its first step, which is safe: the steps come out as they did before,
        with the same noise.  Files that cannot be read are named in ``damaged``.

        Raises:
            RunError: a checkpoint does not fit the network.
        """
        for path in (self.newest, self.older):
            if not path.exists():
                continue
            try:
                with safe_open(path, framework="pt") as f:
                    info = json.loads(f.metadata()["dpsyngen"])
                    tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
            except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
                self.damaged.append(f"{path.name}: {error}")
                continue
            if info["phase"] != phase:
                continue
            try:
                state.restore(tensors, info["step"], info["ema_steps"])
            except (RuntimeError, KeyError, IndexError) as error:
                raise RunError(f"{path} does not fit the run's network: {error}") from None
            return True
        return False

    def clear(self) -> None:
        """Remove the checkpoints, at the end of the run."""
        self.newest.unlink(missing_ok=True)
        self.older.unlink(missing_ok=True)
