"""One of two processes that clip together: ``python sharded_worker.py RANK FOLDER``.

Each computes what one process would have got from all examples, too, compares its own part of it, and writes what it
found to FOLDER/RANK.json.  ``test_sharded.py`` says what it should be.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from dpsyngen.diffusion.unet import UNet
from dpsyngen.privacy.clipping import STYLES, ClippedGradient
from dpsyngen.privacy.kernels import KernelChoices
from dpsyngen.privacy.noise import noisy_mean
from dpsyngen.privacy.per_example import PerExampleGradients
from dpsyngen.privacy.randomness import Randomness, poisson_sample
from dpsyngen.privacy.sharding import OwnExamples, Place, ShardedGradient

NORM = 0.7
WORLD = 2
RANK = int(sys.argv[1])
Rows = Callable[[nn.Module, Tensor], Tensor]
found: dict[str, Any] = {}


class Varied(nn.Module):
    """Parameters of all kinds: looked up, tied, derived, chunked, frozen, of one row, of rows that do not halve."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.a = nn.utils.parametrizations.weight_norm(nn.Linear(6, 7))
        self.b, self.c = nn.Linear(7, 7), nn.Linear(7, 7)
        self.c.weight = self.b.weight
        self.scale = nn.Parameter(torch.randn(7) / 4)
        self.fixed = nn.Linear(7, 7).requires_grad_(False)
        self.out = nn.Linear(7, 1)

    again: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor] | None = None

    def _attend(self, h: Tensor) -> Tensor:
        out: Tensor = self.attention(h, h, h, need_weights=False)[0]
        return out

    def forward(self, indices: Tensor) -> Tensor:
        h = self.embedding(indices)
        mixed = self._attend(h) if self.again is None else self.again(self._attend, h)
        h = torch.tanh(self.a(h + mixed))
        h = self.fixed(torch.tanh(self.b(h)) * (1 + self.scale.square()))
        return self.out(torch.tanh(self.c(h))).flatten(1)


def varied() -> tuple[nn.Module, Tensor, Rows]:
    torch.manual_seed(3)
    return Varied(), torch.randint(0, 5, (6, 4)), lambda model, x: 3 * model(x).square().sum(1)


def unet() -> tuple[nn.Module, Tensor, Rows]:
    torch.manual_seed(4)
    model = UNet("nano", 8, 1, num_classes=3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)  # no layer at zero
    levels, classes = torch.linspace(-1, 1, 6), torch.arange(6) % 4

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        images, which = x[:, 1:].view(-1, 1, 8, 8), x[:, 0].long()
        return (net(images, levels[which], classes[which]) - 0.3).square().flatten(1).sum(1)

    return model, torch.cat([torch.arange(6.0)[:, None], torch.randn(6, 64)], 1), loss


def two_rows() -> tuple[nn.Module, Tensor, Rows]:
    """Row 0 of the weight is in process 0, row 1 in process 1; what the loss makes of the two is in the data."""
    torch.manual_seed(5)
    x = torch.randn(6, 5)
    x[:, 3:] = 1.0
    x[1, 4] = float("nan")
    x[2, 3] = 1e25  # its square is beyond fp32
    x[3, 3:] = 1e-20  # its square, too
    return nn.Linear(3, 2), x, lambda model, x: (model(x[:, :3]) * x[:, 3:]).sum(1)


MODELS = {"varied": varied, "unet": unet, "two rows": two_rows}


def shard(module: nn.Module, mesh: DeviceMesh, **settings: Any) -> nn.Module:
    """A copy, sharded block by block."""
    module = deepcopy(module)
    blocks = [*module.down, module.middle, *module.up] if isinstance(module, UNet) else []
    for block in [*blocks, *([module.attention] if isinstance(module, Varied) else [])]:
        fully_shard(block, mesh=mesh, **settings)
    fully_shard(module, mesh=mesh, **settings)
    return module


def engine_of(module: nn.Module, style: Any = "flat", **settings: Any) -> PerExampleGradients:
    kind = PerExampleGradients if "workers" in settings else OwnExamples
    return kind(module, NORM, style=style, kernels=KernelChoices(measure=False), **settings)


def own_part(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def own_error(got: list[Tensor], places: tuple[Place, ...], whole: list[Tensor]) -> float:
    """Largest difference from this process's part of what one process got, relative to each tensor's largest value."""
    worst = 0.0
    for value, place, reference in zip(got, places, whole, strict=True):
        own = own_part(value)
        expected = reference[place.first :][: place.length] if reference.dim() else reference
        assert own.shape == expected.shape, (own.shape, expected.shape)
        if own.numel():
            worst = max(worst, float((own - expected).detach().abs().max() / reference.abs().max().clamp_min(1e-6)))
    return worst


def norm_over_all(tensors: list[Tensor]) -> float:
    square = torch.stack([own_part(t).double().square().sum() for t in tensors]).sum()
    dist.all_reduce(square)
    return float(square.sqrt())


def own_share(x: Tensor, sizes: tuple[int, int]) -> tuple[Tensor, int]:
    """This process's rows, filled up with rubbish to as many as the other has."""
    mine = x[: sizes[0]] if RANK == 0 else x[sizes[0] : sum(sizes)]
    rubbish = torch.full_like(x[: max(sizes) - len(mine)], 1)
    return torch.cat([mine, rubbish]), len(mine)


def compare(name: str, got: ClippedGradient, expected: ClippedGradient) -> None:
    assert isinstance(got, ShardedGradient)
    entry = found.setdefault(name, {"error": 0.0, "facts": True, "not_finite": expected.not_finite})
    entry["error"] = max(entry["error"], own_error(got.sums, got.places, expected.sums))
    entry["facts"] &= (got.examples, got.not_finite, got.l2_sensitivity) == (
        expected.examples,
        expected.not_finite,
        NORM,
    )


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-5, atol=0, equal_nan=True)


def equals_one_process(mesh: DeviceMesh) -> None:
    for name, make in MODELS.items():
        module, x, loss = make()
        split = shard(module, mesh)
        for style in STYLES if name != "unet" else STYLES[:1]:
            plain, own = engine_of(module, style, workers=1), engine_of(split, style)
            whole = plain.sum(lambda part: loss(module, x[part]), 6)  # noqa: B023 - used here only
            for sizes in ((4, 2), (0, 6)):
                rows, valid = own_share(x, sizes)
                got = own.sum(lambda part: loss(split, rows[part]), len(rows), valid=valid, physical_batch=3)  # noqa: B023
                compare(name, got, whole)
                found[name]["facts"] &= close(
                    got.norms, whole.norms[: sizes[0]] if RANK == 0 else whole.norms[sizes[0] :]
                )
            # Noise multiplicity, and padding in the middle.
            valid = torch.tensor([True, False, True])
            got = own(lambda: loss(split, x), 3, 2, valid=0 if RANK == 0 else valid)  # noqa: B023
            pairs = plain(lambda: loss(module, x), 3, 2, valid=valid)  # noqa: B023
            kept = plain(lambda: loss(module, x[[0, 1, 4, 5]]), 2, 2)  # noqa: B023
            compare(name, got, pairs)
            compare(name, got, kept)
        untouched = all(p.grad is None for p in (*split.parameters(), *module.parameters()))
        found[f"no gradient is left behind, {name}"] = untouched


def other_ways_to_shard(mesh: DeviceMesh) -> None:
    module, x, loss = unet()
    whole = engine_of(module, workers=1).sum(lambda part: loss(module, x[part]), 6)
    ghosts = KernelChoices(chosen=dict.fromkeys(_signatures(module, x, loss), "ghost"))

    cases: dict[str, tuple[dict[str, Any], KernelChoices | None]] = {
        "left whole after the forward pass": ({"reshard_after_forward": False}, None),
        "norms without gradients": ({}, ghosts),
    }
    for name, (settings, kernels) in cases.items():
        split = shard(module, mesh, **settings)
        engine = OwnExamples(split, NORM, kernels=kernels or KernelChoices(measure=False))
        rows, valid = own_share(x, (4, 2))
        got = engine.sum(lambda part: loss(split, rows[part]), len(rows), valid=valid)  # noqa: B023
        compare(name, got, whole)

    # Activation checkpointing, of a block that is sharded on its own.
    odd, indices, odd_loss = varied()
    expected = engine_of(odd, workers=1).sum(lambda part: odd_loss(odd, indices[part]), 6)
    split = shard(odd, mesh)
    engine = engine_of(split)
    split.again = partial(checkpoint, use_reentrant=False, context_fn=engine.checkpoint_contexts)
    rows, valid = own_share(indices, (4, 2))
    got = engine.sum(lambda part: odd_loss(split, rows[part]), len(rows), valid=valid)
    compare("activation checkpointing", got, expected)


def _signatures(module: nn.Module, x: Tensor, loss: Rows) -> list[str]:
    kernels = KernelChoices(measure=False)
    PerExampleGradients(module, NORM, kernels=kernels, workers=1)(lambda: loss(module, x), 6)
    return list(kernels.chosen)


def sensitivity(mesh: DeviceMesh) -> None:
    """Norms over the whole model of how the sum changes when an example in process 1 comes or goes."""
    module, x, loss = varied()
    split = shard(module, mesh)
    changes = found.setdefault("changes", {})
    for style in STYLES:
        for scale in (1e-3, 1.0, 1e6):
            own = engine_of(split, style)
            rows = x[:3] if RANK == 0 else x[3:]

            def scaled(part: slice, rows: Tensor = rows, scale: float = scale) -> Tensor:
                return scale * loss(split, rows[part])

            a, b = own.sum(scaled, 3), own.sum(scaled, 3, valid=3 if RANK == 0 else 2)
            change = norm_over_all([u - v for u, v in zip(a.sums, b.sums, strict=True)])
            changes[f"{style}, {scale}"] = change / a.l2_sensitivity


def noise(mesh: DeviceMesh) -> None:
    settings: dict[str, Any] = {
        "noise_multiplier": 1.3,
        "expected_examples": 5.0,
        "randomness": Randomness.from_insecure_seed(1),
        "step": 7,
    }
    same = True
    for module in (varied()[0], unet()[0]):
        engine = engine_of(shard(module, mesh))
        got = noisy_mean(engine.zero(), **settings)
        expected = noisy_mean(engine_of(module, workers=1).zero(), **settings)
        for value, place, whole in zip(got, engine.zero().places, expected, strict=True):
            same &= torch.equal(own_part(value), whole[place.first :][: place.length])
            same &= type(value) is type(engine.parameters[0].data)
    found["noise is the same to the last bit"] = same


def training(mesh: DeviceMesh) -> None:
    """Three steps of DP-SGD with Adam.  The loop is the same for both; only who has which rows differs."""

    def train(module: nn.Module, loss: Rows, engine: PerExampleGradients, mine: Callable[[Tensor], tuple[Tensor, int]]):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        randomness = Randomness.from_insecure_seed(2)
        for step in range(3):
            chosen = torch.from_numpy(poisson_sample(randomness, step, len(data), 0.3))
            rows, valid = mine(chosen)
            clipped = engine.sum(lambda part: loss(module, data[rows[part]]), len(rows), valid=valid)  # noqa: B023
            noisy = noisy_mean(
                clipped, noise_multiplier=0.8, expected_examples=0.3 * len(data), randomness=randomness, step=step
            )
            for parameter, gradient in zip(engine.parameters, noisy, strict=True):
                parameter.grad = gradient
            optimizer.step()
        return optimizer

    module, _, loss = varied()
    torch.manual_seed(9)
    data = torch.randint(0, 5, (20, 4))
    split = shard(module, mesh)

    def share(chosen: Tensor) -> tuple[Tensor, int]:
        mine = chosen[RANK::WORLD]
        return torch.cat([mine, mine.new_zeros(-(-len(chosen) // WORLD) - len(mine))]), len(mine)

    own = engine_of(split)
    optimizer = train(split, loss, own, share)
    before = deepcopy(module)
    plain = engine_of(module, workers=1)
    train(module, loss, plain, lambda chosen: (chosen, len(chosen)))
    moved = max(
        float((a - b).detach().abs().max()) for a, b in zip(module.parameters(), before.parameters(), strict=True)
    )
    places = own.zero().places
    found["weights after three steps"] = {
        "moved": moved,
        "own": own_error(own.parameters, places, plain.parameters),
    }

    # What a process holds between two steps.
    whole = sum(p.numel() for p in plain.parameters)
    state = [v for s in optimizer.state.values() for v in s.values() if v.dim()]
    gathered = own._gathered._kept
    found["numbers held"] = {
        "parameters": sum(own_part(p).numel() for p in split.parameters() if p.requires_grad) / whole,
        "gradients": sum(own_part(p.grad).numel() for p in split.parameters() if p.grad is not None) / whole,
        "optimizer": sum(own_part(v).numel() for v in state) / whole,
        "gathered parameters": sum(p.untyped_storage().nbytes() for p in gathered),
        "of how many": len(gathered),
    }


def refusals(mesh: DeviceMesh) -> None:
    module, x, loss = varied()
    split = shard(module, mesh)
    own = engine_of(split)
    partly = deepcopy(module)
    fully_shard(partly.attention, mesh=mesh)
    grid = init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("replicas", "shards"))
    columns = partial(shard, nn.Linear(2, 2), mesh, shard_placement_fn=lambda p: Shard(p.dim() - 1))

    def mixing(part: slice) -> Tensor:
        rows = loss(split, x[part])
        return rows * (1 + rows.mean())

    attempts: dict[str, Callable[[], object]] = {
        "wrong shape": lambda: own(lambda: loss(split, x)[:5], 6),
        "never run": lambda: engine_of(shard(module, mesh))(lambda: loss(nn.Module(), x), 6),
        "unequal": lambda: own.sum(lambda part: loss(split, x[part]), 3 + RANK),
        "other batches": lambda: own.sum(lambda part: loss(split, x[part]), 4, physical_batch=1 + RANK),
        "none": lambda: own(lambda: loss(split, x[:0]), 0),
        "the engine of a whole model": lambda: engine_of(split, workers=1),
        "a whole model": lambda: engine_of(module),
        "grid": lambda: own.sum_on_grid(lambda part: loss(split, x[part]), 3, grid=2.0**-20),
        "partly sharded": lambda: engine_of(partly),
        "second axis": lambda: engine_of(columns()),
        "replicas": lambda: engine_of(shard(module, grid)),
        "mixing, own": lambda: own.verify(mixing, 3),
        "too many valid": lambda: own(lambda: loss(split, x), 6, valid=7),
        "valid of another shape": lambda: own(lambda: loss(split, x), 6, valid=torch.ones(5, dtype=torch.bool)),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except Exception as error:
            found.setdefault("refused", {})[name] = f"{type(error).__name__}: {error}"
    # All of them were refused in both processes before or between passes, so the two can go on.
    own.verify(lambda part: loss(split, x[part]), 2)
    empty = own.sum(lambda part: loss(split, x[part]), 0)
    compare("empty", empty, engine_of(module, workers=1).zero())
    padding = own.sum(lambda part: loss(split, x[part]), 3, valid=0)
    compare("empty", padding, engine_of(module, workers=1).zero())
    double = padding + own.sum(lambda part: loss(split, x[part]), 6, valid=6 if RANK == 0 else 0)
    compare("added", double, engine_of(module, workers=1)(lambda: loss(module, x), 6))


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=RANK, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    checks: list[Callable[[DeviceMesh], None]] = [
        *(equals_one_process, other_ways_to_shard, sensitivity, noise, training, refusals),
    ]
    seconds = {}
    for check in checks:
        begin = time.perf_counter()
        check(mesh)
        seconds[check.__name__] = time.perf_counter() - begin
    found["seconds"] = seconds
    (folder / f"{RANK}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
