"""Checkpoints: everything that a resumed run needs to go on exactly, in one safetensors file.

No random state is saved but the step number: all randomness is keyed by step (see ``privacy.randomness``).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dpsyngen.diffusion.denoiser import Ema
from dpsyngen.errors import RunError
from dpsyngen.files import write_atomically
from dpsyngen.privacy.ledger import Head, Ledger


def save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file in place; OSError if the disk is full or read-only.

    The library's own ``save_file`` goes through a temporary file of its own, which a killed process leaves behind, and
    tells of a full disk as a SafetensorError.
    """
    # Convolutions may have their channels last in memory (docs/hardware.md); files never do.
    path.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))


@dataclass
class TrainState:
    """What changes while a network trains."""

    module: nn.Module
    ema: Ema
    optimizers: dict[str, torch.optim.Optimizer]  # by name; a shared network has one for public, one for private steps
    step: int = 0  # steps done

    def tensors(self) -> dict[str, Tensor]:
        """Everything, by name."""
        out = {f"model/{k}": v for k, v in self.module.state_dict().items()}
        out |= {f"ema/{k}": v for k, v in self.ema.average.items()}
        for name, optimizer in self.optimizers.items():
            for i, p in enumerate(self.module.parameters()):
                for key, value in optimizer.state.get(p, {}).items():
                    out[f"optimizer/{name}/{i}/{key}"] = torch.as_tensor(value)
        return {k: v.detach().contiguous() for k, v in out.items()}

    def misfit(self, tensors: dict[str, Tensor]) -> str | None:
        """Why `tensors` cannot be those of this network and its optimizers; None if they can be."""
        wanted = {f"model/{k}": v for k, v in self.module.state_dict().items()}
        wanted |= {f"ema/{k}": v for k, v in self.ema.average.items()}
        for name in self.optimizers:
            prefix = f"optimizer/{name}/"
            # Either the optimizer has taken no step yet, or it has the same entries for each parameter.
            entries = {k.removeprefix(prefix).partition("/")[2] for k in tensors if k.startswith(prefix)}
            for i, p in enumerate(self.module.parameters()):
                wanted |= {f"{prefix}{i}/{e}": torch.empty(()) if e == "step" else p for e in entries}
        for name in sorted(wanted.keys() | tensors.keys()):
            have, want = tensors.get(name), wanted.get(name)
            if have is None or want is None:
                return f"it {'lacks' if have is None else 'has'} {name!r}"
            if (have.shape, have.dtype) != (want.shape, want.dtype):
                return f"{name!r} is {list(have.shape)} {have.dtype}, but must be {list(want.shape)} {want.dtype}"
        return None

    def restore(self, tensors: dict[str, Tensor], step: int, ema_steps: int) -> None:
        """The inverse of :meth:`tensors`, for tensors without :meth:`misfit`."""
        self.step, self.ema.steps = step, ema_steps
        self.module.load_state_dict(_under(tensors, "model/"))
        parameters = list(self.module.parameters())
        device = parameters[0].device
        self.ema.average = {k: v.to(device) for k, v in _under(tensors, "ema/").items()}
        for name, optimizer in self.optimizers.items():
            for key, value in _under(tensors, f"optimizer/{name}/").items():
                index, entry = key.split("/")
                # Adam keeps its step count on the CPU.
                optimizer.state[parameters[int(index)]][entry] = value if entry == "step" else value.to(device)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@dataclass(frozen=True)
class Stored:
    """A checkpoint as read from a file that is whole."""

    path: Path
    phase: str
    step: int
    ema_steps: int
    ledger: Head
    tensors: dict[str, Tensor]


def read_checkpoints(folder: Path) -> tuple[list[Stored], list[str]]:
    """The readable checkpoints in a run's private folder, newest first, and what is wrong with the others."""
    good, bad = [], []
    for path in (folder / name for name in _NAMES):
        if not path.exists():
            continue
        try:
            with safe_open(path, framework="pt") as f:
                text, digest = f.metadata()["dpsyngen"], f.metadata()["digest"]
                # Copies: with some versions of the library the tensors are views of the file.
                tensors = {k: f.get_tensor(k).clone() for k in f.keys()}  # noqa: SIM118
            if _digest(text, tensors) != digest:
                raise ValueError("its content is not what was written")
            info = json.loads(text)
            stored = Stored(path, info["phase"], info["step"], info["ema_steps"], Head(**info["ledger"]), tensors)
            numbers = (stored.step, stored.ema_steps, stored.ledger.lines)
            if any(type(n) is not int for n in numbers) or type(stored.phase) is not str:
                raise TypeError("its step is not a number")
            good.append(stored)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            bad.append(f"{path.name}: {error}")
    return good, bad


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    h = hashlib.blake2b(text.encode(), digest_size=32)
    for name, t in sorted(tensors.items()):
        h.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        h.update(t.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


_NAMES = ("checkpoint.safetensors", "checkpoint-previous.safetensors")


class Checkpoints:
    """The last two checkpoints of a run; the older one is the fallback if the newer one is damaged.

    Each holds the head of the ledger at its time.  A ledger without that line has lost charges: it was put back to an
    earlier state while the checkpoint was not.  `folder` is the run's private folder.
    """

    def __init__(self, folder: Path, ledger: Ledger) -> None:
        self.newest, self.older = (folder / name for name in _NAMES)
        self.ledger = ledger
        self.damaged: list[str] = []
        self._newest_is_good = False

    def save(self, phase: str, state: TrainState) -> None:
        """Write the state of `phase`; the one before is kept until the next, so that one is good at any moment."""
        head = self.ledger.head
        info = {"phase": phase, "step": state.step, "ema_steps": state.ema.steps, "ledger": asdict(head)}
        text, tensors = json.dumps(info), {k: v.cpu() for k, v in state.tensors().items()}
        metadata = {"dpsyngen": text, "digest": _digest(text, tensors)}

        def write(temporary: Path) -> None:
            save_file(tensors, temporary, metadata)
            # Only now that the next one is written.  A damaged one must not take the place of a good one.
            if self._newest_is_good:
                self.newest.replace(self.older)

        write_atomically(self.newest, write, 0o600)
        self._newest_is_good = True

    def load(self, phase: str, state: TrainState, steps: int, charged: int | None = None) -> bool:
        """Restore `state` from the newest readable checkpoint of `phase`; False if there is none.

        A phase without a checkpoint starts at its first step, which is safe: the steps come out as they did before,
        with the same noise.  Files that cannot be read are named in ``damaged``.  The phase has so many `steps` in all,
        of which the ledger has `charged` (None: a public phase).  RunError if a checkpoint does not fit them.
        """
        stored, self.damaged = read_checkpoints(self.newest.parent)
        self._newest_is_good = any(s.path == self.newest for s in stored)
        for s in stored:
            mine = s.phase == phase
            if not self.ledger.has_been(s.ledger) or (mine and charged is not None and charged < s.step <= steps):
                raise RunError(
                    f"{s.path}, after step {s.step} of the phase {s.phase!r}, knows of charges that are not in "
                    f"{self.ledger.path}: that was put back to an earlier state, or the files are of different runs.  "
                    "Going on would lose charges.  Put back all of private/ as it was at one time, or start a new run."
                )
        for s in stored:
            if s.phase != phase:
                continue
            misfit = state.misfit(s.tensors)
            if not 0 <= s.step <= steps or s.ema_steps < 0:
                misfit = f"it says that {s.step} steps were done, but the phase {phase!r} has {steps}"
            if misfit is not None:
                raise RunError(
                    f"{s.path} does not fit the run: {misfit}.  The configuration was changed, or the file is of "
                    "another run.  Undo the change, or start a new run."
                )
            state.restore(s.tensors, s.step, s.ema_steps)
            return True
        return False


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints in a run's private folder, at the end of the run."""
    for name in _NAMES:
        (folder / name).unlink(missing_ok=True)
