"""Several processes that do one thing together, as torchrun starts them.

One process, the main one (rank 0), leads: it alone owns files (run directory, ledger, checkpoints), draws the noise,
takes the optimizer's steps and talks to the user.  The others follow: they wait for a command, compute their share and
hand it over.  So there is one book-keeper and one noise however many processes there are, and the weights of all are
those of the main one, not copies that could drift apart on unlike processors.

Commands and figures travel over gloo (TCP), gradients and weights over NCCL where there are GPUs.  Neither encrypts:
what private images leave in gradients, and the key of the noise, pass through that network, so it has to be as trusted
as the machines are.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from dpsyngen.errors import ConfigError, DpsyngenError, RunError

if TYPE_CHECKING:
    from torch import Tensor

MAIN = 0
_times = itertools.count()  # how often this process has joined the others
_PATIENCE = timedelta(hours=2)  # followers wait while the main process evaluates, writes, or finds a batch that fits

_T = TypeVar("_T")


class RankLost(RunError):
    """Another process of the group is gone, so nothing can be finished together."""

    kind = "rank-lost"


class Dismissed(DpsyngenError):
    """In a follower: the main process failed and has told the user why."""

    kind = "dismissed"


@dataclass(frozen=True)
class Command:
    """What the main process asks of the others: a name, and values that can be pickled."""

    name: str
    values: dict[str, Any]


FAILED = "failed"
END = "end"


@dataclass(eq=False)
class Ranks:
    """The processes that work together; see :func:`joined`.  All methods raise RankLost if one of them is gone.

    Attributes:
        rank: number of this process, 0 .. count - 1.
        count: how many there are.
        local_rank: number of this process on its machine, which is the GPU that it gets.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    _free: bool = field(default=True, repr=False)  # whether the followers wait for a command

    @property
    def main(self) -> bool:
        """Whether this process leads."""
        return self.rank == MAIN

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.count == 1

    def share(self, total: int) -> slice:
        """Which of `total` things are this process's: contiguous, as even as can be, maybe none."""
        return slice(self.rank * total // self.count, (self.rank + 1) * total // self.count)

    # ------------------------------------------------------------------------------------------ commands

    @contextlib.contextmanager
    def lead(self, name: str, **values: Any) -> Iterator[None]:
        """In the main process: have the others do `name`.  Within the context this process does its own part."""
        if not self.main:
            raise AssertionError(f"rank {self.rank} cannot lead")
        if not self.alone:
            self._exchange(Command(name, values))
            self._free = False
        yield
        self._free = True  # not after an error: the others may be anywhere

    def tell(self, name: str, **values: Any) -> None:
        """In the main process: have the others do something that it has no part in."""
        with self.lead(name, **values):
            pass

    def next_command(self) -> Command:
        """In a follower: wait for what to do.  Raises Dismissed if the main process failed and said why."""
        command: Command = self._exchange(None)
        if command.name == FAILED:
            raise Dismissed(str(command.values["message"]))
        return command

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """In the main process: the time in which the others follow.  However it ends, they are told."""
        try:
            yield
        except RankLost:
            raise  # there is nobody to be told, or no way to
        except BaseException as error:
            # Followers that are in the middle of a step do not listen; they see the connection close.
            if self._free and not self.alone:
                with contextlib.suppress(DpsyngenError):
                    self._exchange(Command(FAILED, {"message": f"{type(error).__name__}: {error}"}))
            raise
        self.tell(END)

    def _exchange(self, command: Command | None) -> Any:
        box: list[Any] = [command]
        with self._group() as dist:
            dist.broadcast_object_list(box, src=MAIN)
        return box[0]

    # ------------------------------------------------------------------------------------------- objects

    def gather(self, value: _T) -> list[_T]:
        """What all processes give, in the order of their ranks; in every process."""
        if self.alone:
            return [value]
        out: list[Any] = [None] * self.count
        with self._group() as dist:
            dist.all_gather_object(out, value)
        return out

    def from_main(self, value: _T) -> _T:
        """What the main process gives, in every process."""
        return value if self.alone else self._exchange(value)  # type: ignore[arg-type]

    def agree(self, work: Callable[[], _T]) -> _T:
        """Do something in every process; if it fails in any, it has failed in all.

        The main process gets the first error, with the rank it is of; the others :class:`Dismissed`.
        """
        if self.alone:
            return work()
        error: DpsyngenError | OSError | None = None
        try:
            result = work()
        except (DpsyngenError, OSError) as caught:
            error = caught
        failed = [(r, e) for r, e in enumerate(self.gather(None if error is None else str(error))) if e is not None]
        if not failed:
            return result
        if not self.main:
            raise Dismissed(str(error or failed[0][1]))
        if error is not None:
            raise error
        rank, text = failed[0]
        raise RunError(f"in the process of rank {rank} (of {self.count}): {text}")

    # ------------------------------------------------------------------------------------------- tensors

    def sum_to_main(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over all processes of tensors of one dtype and device; only in the main process they are of use."""
        import torch

        if self.alone:
            return list(tensors)
        flat = torch.cat([t.detach().reshape(-1) for t in tensors])
        with self._group() as dist:
            dist.reduce(flat, dst=MAIN)
            if flat.device.type != "cpu":
                torch.cuda.synchronize(flat.device)  # an error of another process shows here, not in a later step
        return [f.view(t.shape) for f, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]

    def sum_everywhere(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in every process."""
        if self.alone:
            return tensor
        out = tensor.clone()
        with self._group() as dist:
            dist.all_reduce(out)
        return out

    def copy_from_main(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors of one dtype with those of the main process."""
        import torch

        if self.alone:
            return
        with torch.no_grad(), self._group() as dist:
            flat = torch.cat([t.detach().reshape(-1) for t in tensors])
            dist.broadcast(flat, src=MAIN)
            if not self.main:
                for t, new in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                    t.copy_(new.view(t.shape))

    def gather_to_main(self, value: _T) -> list[_T] | None:
        """What all processes give, in the order of their ranks; None but in the main process."""
        if self.alone:
            return [value]
        out: list[Any] | None = [None] * self.count if self.main else None
        with self._group() as dist:
            dist.gather_object(value, out, dst=MAIN)
        return out

    # -------------------------------------------------------------------------------------------- errors

    @contextlib.contextmanager
    def _group(self) -> Iterator[Any]:
        """``torch.distributed``, in which a process that is gone raises RankLost."""
        import torch.distributed as dist

        try:
            yield dist
        except RuntimeError as error:
            if isinstance(error, DpsyngenError) or "out of memory" in str(error):
                raise
            raise RankLost(
                f"a process of the {self.count} that work together is gone (seen by rank {self.rank}: "
                f"{str(error).strip().splitlines()[0][:200]}), so all stop.  "
                "What it said itself, if anything, stands above.  "
                "Start the same command again, with any number of processes; a training goes on from its last "
                "checkpoint, which is whole, with --resume."
            ) from None


ALONE = Ranks()
"""One process."""


def started_by_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ and "WORLD_SIZE" in os.environ


def numbers() -> tuple[int, int, int]:
    """(rank, number of processes, rank on this machine) as torchrun set them; (0, 1, 0) without torchrun."""
    if not started_by_torchrun():
        return 0, 1, 0
    given = {k: os.environ.get(k, "0") for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    rank, count, local = (int(v) if v.isdecimal() else -1 for v in given.values())
    if not (0 <= rank < count and local >= 0):
        raise ConfigError(
            f"the environment has {given}, which torchrun would not set: start the processes by torchrun."
        )
    return rank, count, local


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that torchrun started, this one among them; one process alone without torchrun.

    All processes may run the same code on their own share (:meth:`Ranks.share`, :meth:`Ranks.gather`), or the main one
    may lead the others (:meth:`Ranks.leading`).  A process that is gone ends all of them: torchrun stops the rest, and
    who waits for it sees the connection close.

    Raises:
        RankLost: a process is gone.
        ConfigError: the processes cannot find each other.
    """
    rank, count, local = numbers()
    if count == 1:
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local % torch.cuda.device_count())
    ranks = Ranks(rank, count, local)
    made = not dist.is_initialized()
    if made:
        try:
            # A script may join more than once: each time has names of its own in the store that torchrun keeps.
            store, _, _ = next(dist.rendezvous("env://"))
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                store=dist.PrefixStore(f"dpsyngen-{next(_times)}", store),
                rank=rank,
                world_size=count,
                timeout=_PATIENCE,
            )
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"the {count} processes could not find each other ({str(error).splitlines()[0][:200]}).  Look at "
                "MASTER_ADDR and MASTER_PORT (torchrun --rdzv-endpoint), at firewalls, and with several network "
                "interfaces at GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME."
            ) from None
    try:
        yield ranks
    except RankLost:
        made = False  # to say goodbye to a group that lacks one could take for ever
        raise
    finally:
        if made:
            # The threads of the group go, too: those that outlive it would abort the interpreter as it exits.
            gc.collect()  # what refers to the group, such as unfinished generators in a cycle
            dist.destroy_process_group()
            gc.collect()
