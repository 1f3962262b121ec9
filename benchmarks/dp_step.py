"""How long one clipped gradient takes: our engine, Opacus and torch.func against ordinary autograd.

A step is one forward and backward pass over a physical batch of ``examples * copies`` rows, up to the sum of clipped
per-example gradients; no noise, no optimizer.  All methods get the same weights, the same batch and the same clipping
norm (the median of the examples' norms, so that about half of them are clipped), and each one's sum is compared with
ours before it is timed: a row whose sums differ is flagged, and the script then ends with status 1.

    plain             ordinary autograd without clipping, in the faster of two memory formats: the baseline
    plain, shared     the same with the batch shared by threads as our engine shares it, which PyTorch does not do
    ours              dpsyngen.privacy.per_example
    opacus-hooks      GradSampleModule, with its copies added up layer by layer (Opacus itself has no copies)
    opacus-functorch  the same with force_functorch, each layer's gradients as one function of an example's K rows
    opacus-ghost      ghost clipping with two backward passes; one copy only
    opacus-fast       fast gradient clipping with two backward passes; stands in for opacus-ghost at several copies
    vmap              torch.func: vmap of grad

Within a row the methods take turns, round by round.  "seconds" is the median over rounds; "ratio" is the median over
rounds of the time over the plain step's time in the same round, which a machine shared with others disturbs less.
Memory is the peak above what was there before the step.  GFLOP/s counts the operations of the plain step for every
method, so work that a method adds shows as a lower rate.

    python benchmarks/dp_step.py --json dp_step.json
    python benchmarks/dp_step.py --quick     # under a minute; the last line is JSON
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Threads that spin while they wait slow down a machine shared with others.  Must be set before PyTorch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from dp_step_rivals import (
    INSTALL,
    OPACUS,
    RIVALS,
    Method,
    Task,
    Unavailable,
    build,
    missing,
    our_engine,
    ours,
    plain_shared,
    quiet,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dpsyngen.diffusion.denoiser import NetworkDenoiser
from dpsyngen.diffusion.loss import NoiseLevels, NoisyBatch, denoising_loss, make_noisy
from dpsyngen.diffusion.unet import SIZES, UNet, count_parameters

BEGUN = time.perf_counter() - time.process_time()  # about when the process started
PLAIN = ("plain contiguous", "plain channels-last")
SHARED = "plain, shared batch"
DEFAULT_NETWORKS = ("small@28", "base@28", "small@32", "paper-32@32", "diffusers")
CHANNELS = {28: 1, 32: 3}
CLASSES = 10
TOLERANCE = 1e-4
TOLERANCE_AUTOCAST = 0.05  # bfloat16 has 8 bits; sums of many rounded terms
QUICK_SECONDS = 36.0
QUICK_RIVALS = ("opacus-hooks", "opacus-functorch")  # those with copies; opacus-fast took longest wherever we looked


# ------------------------------------------------------------------------------------------------------ networks


def unet_task(name: str, examples: int, copies: int, device: torch.device, seed: int = 0) -> Task:
    """One of our U-Nets with the loss it is trained with; `name` is "preset@resolution"."""
    preset, _, pixels = name.partition("@")
    resolution = int(pixels)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    module = NetworkDenoiser(UNet(preset, resolution, CHANNELS[resolution], CLASSES), CLASSES)
    images = torch.rand(examples, CHANNELS[resolution], resolution, resolution, generator=generator) * 2 - 1
    labels = torch.randint(0, CLASSES, (examples,), generator=generator)
    made = make_noisy(
        images,
        labels,
        NoiseLevels(),
        copies=copies,
        num_classes=CLASSES,
        label_dropout=0.1,
        generator=generator,
    )
    assert made.labels is not None

    def row_losses(module: NetworkDenoiser, *batch: Tensor) -> Tensor:
        return denoising_loss(module, NoisyBatch(*batch))

    batch = (made.clean, made.noisy, made.sigma, made.labels)
    return _placed(module, batch, row_losses, examples, copies, device)


def diffusers_task(examples: int, copies: int, device: torch.device, seed: int = 0) -> Task:
    """A small UNet2DModel of diffusers that predicts the noise in its input."""
    with quiet():
        from diffusers import UNet2DModel
    torch.manual_seed(seed)
    module = UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    rows = examples * copies
    generator = torch.Generator().manual_seed(seed)
    clean = (torch.rand(examples, 1, 32, 32, generator=generator) * 2 - 1).repeat_interleave(copies, 0)
    noise = torch.randn(clean.shape, generator=generator)
    times = torch.randint(0, 1000, (rows,), generator=generator)
    share = (times / 1000).view(-1, 1, 1, 1)
    noisy = (1 - share).sqrt() * clean + share.sqrt() * noise

    def row_losses(module: nn.Module, noisy: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        return (module(noisy, times).sample - noise).square().flatten(1).mean(1)

    return _placed(module, (noisy, times, noise), row_losses, examples, copies, device)


def _placed(
    module: nn.Module,
    batch: tuple[Tensor, ...],
    row_losses: Callable[..., Tensor],
    examples: int,
    copies: int,
    device: torch.device,
) -> Task:
    # At initialisation some layers are (nearly) zero and hide the gradients of others from the comparison of sums.
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape) * 0.03)
    return Task(module.to(device), tuple(t.to(device) for t in batch), row_losses, examples, copies)


def make_task(name: str, examples: int, copies: int, device: torch.device) -> Task:
    return (diffusers_task if name == "diffusers" else lambda *a: unet_task(name, *a))(examples, copies, device)


# --------------------------------------------------------------------------------------------------- measurement


@dataclass
class Result:
    """What is known of one method in one row.

    Attributes:
        seconds: of each timed round, None where the method sat out.
        difference: relative L2 difference from our sum in fp32; None for plain and ours.
        difference_autocast: the same under autocast.
        peak_bytes: memory above the start.
        error: why there are no numbers.
    """

    seconds: list[float | None] = field(default_factory=list)
    difference: float | None = None
    difference_autocast: float | None = None
    peak_bytes: int | None = None
    error: str | None = None
    note: str = ""

    @property
    def median(self) -> float | None:
        taken = [s for s in self.seconds if s is not None]
        return statistics.median(taken) if taken else None

    def ratio_to(self, other: Result) -> float | None:
        pairs = [a / b for a, b in zip(self.seconds, other.seconds, strict=False) if a is not None and b is not None]
        return statistics.median(pairs) if pairs else None


class Row:
    """All methods on one network, one number of copies and one batch."""

    def __init__(self, network: str, task: Task, autocast: bool) -> None:
        self.network, self.task, self.autocast = network, task, autocast
        self.engine, norms = our_engine(task)
        self.clipping_norm = self.engine.clipping_norm
        self.clipped = int((norms > self.clipping_norm).sum())
        self.methods: dict[str, Method] = {}
        self.results: dict[str, Result] = {}
        self.flop = 0
        self.flagged: list[str] = []
        self._sums: list[Tensor] = []
        self._autocast_sums: list[Tensor] = []

    def add(self, name: str) -> None:
        """Build a method, run it, compare its sum with ours; what goes wrong is recorded and not raised."""
        result = self.results[name] = Result()
        try:
            with quiet():
                if name == "ours":
                    method = ours(self.engine, self.task)
                elif name == SHARED:
                    method = plain_shared(self.task)
                else:
                    method = build(name, self.task, self.clipping_norm)
                method.clear()
                sums = self._checked(method, autocast=False)
                if name in PLAIN:
                    if not self.flop:
                        with FlopCounterMode(display=False) as counter:
                            method.step()
                        self.flop = counter.get_total_flops()
                        method.clear()
                elif name == "ours":
                    self._sums = sums
                elif name != SHARED:
                    result.difference = _difference(sums, self._sums)
                    if not result.difference < TOLERANCE:
                        self.flagged.append(name)
                if self.autocast:
                    sums = self._checked(method, autocast=True)
                    if name == "ours":
                        self._autocast_sums = sums
                    elif name not in (*PLAIN, SHARED):
                        result.difference_autocast = _difference(sums, self._autocast_sums)
                        if not result.difference_autocast < TOLERANCE_AUTOCAST and name not in self.flagged:
                            self.flagged.append(name)
        except Unavailable as e:
            result.error = str(e)
        except Exception as e:
            if name in PLAIN or name == "ours":
                raise
            result.error = f"{type(e).__name__}: {str(e).strip().splitlines()[0][:200] if str(e).strip() else ''}"
        else:
            result.note = method.note
            self.methods[name] = method

    def _checked(self, method: Method, autocast: bool) -> list[Tensor]:
        """One pass; without autocast in full fp32 (no TF32 either), so that sums can be compared."""
        self.task.autocast = autocast
        tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        if not autocast:
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        try:
            sums = [s.detach().clone() for s in method.step()]
        finally:
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32
            self.task.autocast = self.autocast
        method.clear()
        return sums

    def run(self, name: str) -> float:
        """Time one pass."""
        method = self.methods[name]
        method.clear()
        synchronise(self.task.device)
        begun = time.perf_counter()
        sums = method.step()
        synchronise(self.task.device)
        seconds = time.perf_counter() - begun
        del sums
        method.clear()
        return seconds

    def measure_memory(self) -> None:
        for name in self.methods:
            with quiet():
                self.results[name].peak_bytes = peak_memory(self.task.device, self.methods[name])

    @property
    def baseline(self) -> str:
        timed = {n: self.results[n].median for n in PLAIN if n in self.results}
        return min(timed, key=lambda n: timed[n] or math.inf)

    def ratio(self, name: str) -> float | None:
        return self.results[name].ratio_to(self.results[self.baseline])

    def as_json(self) -> dict[str, Any]:
        plain, rows = self.results[self.baseline], self.task.examples * self.task.copies
        methods: dict[str, Any] = {}
        for name, r in self.results.items():
            median = r.median
            methods[name] = {
                "seconds": median,
                "ratio": self.ratio(name),
                "rows_per_second": rows / median if median else None,
                "gflop_per_second": self.flop / median / 1e9 if median else None,
                "peak_bytes": r.peak_bytes,
                "peak_ratio": r.peak_bytes / plain.peak_bytes if r.peak_bytes and plain.peak_bytes else None,
                "difference": r.difference,
                "difference_autocast": r.difference_autocast,
                "error": r.error,
                "note": r.note,
                "all_seconds": r.seconds,
            }
        return {
            "network": self.network,
            "image": list(self.task.batch[0].shape[1:]),
            "parameters": count_parameters(self.task.module),
            "copies": self.task.copies,
            "examples": self.task.examples,
            "rows": rows,
            "clipping_norm": self.clipping_norm,
            "clipped_examples": self.clipped,
            "gflop": self.flop / 1e9,
            "baseline": self.baseline,
            "flagged": self.flagged,
            "methods": methods,
        }

    def table(self, matrix_gflops: float) -> str:
        """For people."""
        data = self.as_json()
        shape = "x".join(str(n) for n in (*data["image"][1:], data["image"][0]))
        lines = [
            f"{self.network}  {shape}, {data['parameters'] / 1e6:.2f} M parameters, copies K = {self.task.copies}, "
            f"{self.task.examples} examples, {data['rows']} rows; {self.clipped} of {self.task.examples} clipped",
            f"  {'method':<20}{'seconds':>9}{'ratio':>8}{'rows/s':>9}{'GFLOP/s':>9}{'of matmul':>10}"
            f"{'peak MB':>9}{'ratio':>7}{'difference':>12}",
        ]

        def cell(value: float | None, form: str, width: int) -> str:
            return f"{'–' if value is None else format(value, form):>{width}}"

        for name, m in data["methods"].items():
            if m["error"]:
                lines.append(f"  {name:<20}  no result: {m['error']}")
                continue
            peak = m["peak_bytes"] / 1e6 if m["peak_bytes"] is not None else None
            rate = m["gflop_per_second"]
            lines.append(
                f"  {name:<20}{cell(m['seconds'], '.4f', 9)}{cell(m['ratio'], '.2f', 8)}"
                f"{cell(m['rows_per_second'], '.1f', 9)}{cell(rate, '.1f', 9)}"
                f"{cell(rate / matrix_gflops if rate else None, '.0%', 10)}{cell(peak, '.0f', 9)}"
                f"{cell(m['peak_ratio'], '.2f', 7)}{cell(m['difference'], '.1e', 12)}"
                + ("  baseline" if name == self.baseline else "")
                + (f"  {m['note']}" if m["note"] else "")
                + ("  WRONG SUM" if name in self.flagged else "")
            )
        return "\n".join(lines)


def measure(rows: list[Row], rounds: int, deadline: float = math.inf) -> None:
    """Timed rounds, in each of which every method of every row has its turn.

    With a deadline, rivals sit out where the remaining rounds of plain and ours need the time.
    """
    entries = [(row, name) for row in rows for name in row.methods]
    core = [e for e in entries if e[1] in (*PLAIN, SHARED, "ours")]
    rivals = [e for e in entries if e not in core]
    latest: dict[tuple[Row, str], float] = {}
    turns = dict.fromkeys(rivals, 0)
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            taking = list(core)
            left = deadline - time.perf_counter() - (rounds - i) * sum(latest.get(e, 0.0) for e in core)
            for e in sorted(rivals, key=lambda e: (turns[e], latest.get(e, 0.0))):
                if not turns[e] or latest[e] < left:
                    taking.append(e)
                    turns[e] += 1
                    left -= latest.get(e, 0.0)
            first = i % len(taking)
            times: dict[tuple[Row, str], float] = {}
            with quiet():
                for e in taking[first:] + taking[:first]:
                    times[e] = e[0].run(e[1])
            latest |= times
            for row, name in entries:
                row.results[name].seconds.append(times.get((row, name)))
            gc.collect()
    finally:
        gc.enable()


def _difference(a: list[Tensor], b: list[Tensor]) -> float:
    squares = sum(float((x.double() - y.double()).square().sum()) for x, y in zip(a, b, strict=True))
    return math.sqrt(squares / sum(float(y.double().square().sum()) for y in b))


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device, method: Method) -> int | None:
    """Peak bytes above the start of one pass; on a CPU the middle one of three passes, None where it cannot be told.

    On a CPU it is the kernel's high-water mark of resident memory, reset before the pass and after free memory was
    handed back.  (torch.profiler's memory events would miss what other threads than its own allocate, and everything
    that libraries allocate by themselves.)
    """
    if device.type == "cuda":
        method.clear()
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        method.step()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - start
        method.clear()
        return int(peak)
    peaks = []
    try:
        for _ in range(3):
            method.clear()
            gc.collect()
            with contextlib.suppress(AttributeError, OSError):
                ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            start = _resident("VmRSS")
            method.step()
            peaks.append(_resident("VmHWM") - start)
            method.clear()
    except OSError:
        return None
    return sorted(peaks)[1]


def _resident(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def matrix_product(device: torch.device) -> float:
    """GFLOP/s of a square fp32 matrix product: what this machine gives now, with this number of threads."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    times = []
    for _ in range(9):
        synchronise(device)
        begun = time.perf_counter()
        torch.mm(a, b)
        synchronise(device)
        times.append(time.perf_counter() - begun)
    return 2 * n**3 / statistics.median(times[2:]) / 1e9


def machine(device: torch.device) -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(x.split(":", 1)[1].strip() for x in lines if x.lower().startswith("model name"))
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cpu": model,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "tf32_convolutions": torch.backends.cudnn.allow_tf32 if device.type == "cuda" else None,
        "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


# ---------------------------------------------------------------------------------------------------------- runs


def full(args: argparse.Namespace, device: torch.device, matrix_gflops: float) -> list[Row]:
    """Every network and number of copies."""
    rows: list[Row] = []
    for network in args.presets:
        if network == "diffusers" and missing("diffusers"):
            print(f"diffusers is skipped: it is not installed; {INSTALL['diffusers']}\n", flush=True)
            continue
        for copies in args.copies:
            row = Row(network, make_task(network, max(1, (args.rows or 32) // copies), copies, device), args.autocast)
            for name in ("ours", *PLAIN, SHARED, *args.rivals):
                row.add(name)
            for name in row.methods:
                with quiet():
                    row.run(name)  # the check was the first warm-up
            measure([row], args.runs)
            row.measure_memory()
            print(row.table(matrix_gflops) + "\n", flush=True)
            row.methods.clear()  # the copies of the network that rivals hold go
            rows.append(row)
    return rows


def quick(args: argparse.Namespace, device: torch.device, matrix_gflops: float) -> list[Row]:
    """Plain and ours at K = 1, 4, 8, Opacus at K = 4 with the time that is left.

    The plain step of all three is the same work, the same number of rows through the same network, so one is timed
    for all of them, in the same rounds.
    """
    network, count = args.presets[0], args.rows or 32
    first = Row(network, make_task(network, count, 1, device), args.autocast)
    for name in ("ours", *PLAIN):
        first.add(name)
    tries = {n: statistics.median(first.run(n) for _ in range(2)) for n in PLAIN}
    print("plain: " + ", ".join(f"{n.removeprefix('plain ')} {s:.4f} s" for n, s in tries.items()), flush=True)
    slower, plain = sorted(tries, key=lambda n: -tries[n])
    del first.methods[slower], first.results[slower]
    rows = [first]
    for copies in (4, 8):
        row = Row(network, make_task(network, max(1, count // copies), copies, device), args.autocast)
        row.add("ours")
        row.results[plain], row.flop = first.results[plain], first.flop
        rows.append(row)
    for name in (n for n in args.rivals if n in QUICK_RIVALS):
        rows[1].add(name)
    measure(rows, args.runs, BEGUN + QUICK_SECONDS)
    print()
    for row in rows:
        print(row.table(matrix_gflops) + "\n", flush=True)
    return rows


def summary(rows: list[Row]) -> dict[str, float | None]:
    """The last line of --quick."""
    by_copies = {r.task.copies: r for r in rows}
    values: dict[str, float | None] = {f"k{k}": by_copies[k].ratio("ours") for k in (1, 4, 8)}
    ratios = [by_copies[4].ratio(n) for n in QUICK_RIVALS if n in by_copies[4].results]
    values["opacus_best_k4"] = min((r for r in ratios if r is not None), default=None)
    return {k: None if v is None else round(v, 4) for k, v in values.items()}


# ------------------------------------------------------------------------------------------------------- options


def _network(text: str) -> str:
    preset, _, pixels = text.partition("@")
    pixels = pixels or "28"
    if text == "diffusers":
        return text
    if preset not in SIZES or not pixels.isdigit() or int(pixels) not in CHANNELS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is none; allowed: diffusers, or PRESET@28 (one channel) or PRESET@32 (three) with PRESET one of "
            f"{', '.join(SIZES)}"
        )
    if int(pixels) % SIZES[preset].divisor:
        raise argparse.ArgumentTypeError(f"{preset!r} needs a multiple of {SIZES[preset].divisor} pixels: take @32")
    return f"{preset}@{pixels}"


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 up")
    return int(text)


def _rivals(words: list[str], parser: argparse.ArgumentParser) -> tuple[str, ...]:
    if words == ["all"]:
        return RIVALS
    if words == ["none"]:
        return ()
    unknown = [w for w in words if w not in RIVALS]
    if unknown:
        parser.error(f"--rivals: {unknown[0]!r} is none; allowed: all, none, or some of {', '.join(RIVALS)}")
    return tuple(dict.fromkeys(words))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--presets",
        nargs="+",
        type=_network,
        metavar="NETWORK",
        help=f"diffusers, PRESET@28 or PRESET@32 (default: {' '.join(DEFAULT_NETWORKS)}; with --quick base@28)",
    )
    parser.add_argument("--copies", nargs="+", type=_positive, metavar="K", help="default: 1 4 8")
    parser.add_argument("--rows", type=_positive, help="examples * copies; default 32")
    parser.add_argument("--runs", type=_positive, default=9, help="timed rounds (default 9)")
    parser.add_argument("--threads", type=_positive, help="of PyTorch; default: its own choice")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rivals", nargs="+", default=["all"], metavar="NAME", help=f"all, none, {', '.join(RIVALS)}")
    parser.add_argument("--autocast", action="store_true", help="compute in bfloat16 where PyTorch's autocast does")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything that was measured here")
    parser.add_argument("--quick", action="store_true", help="one network, K = 1, 4, 8, Opacus at 4; under 50 seconds")
    args = parser.parse_args()
    args.rivals = _rivals(args.rivals, parser)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no CUDA device; allowed here: cpu")
    if args.quick and args.copies not in (None, [1, 4, 8]):
        parser.error("--copies: with --quick only 1 4 8")
    if args.quick and args.presets and (len(args.presets) > 1 or args.presets[0] == "diffusers"):
        parser.error("--presets: with --quick one of our own networks")
    if args.quick and (args.rows or 16) % 8:
        parser.error("--rows: with --quick a multiple of 8, so that all K have as many rows and share the plain step")
    args.presets = args.presets or (["base@28"] if args.quick else list(DEFAULT_NETWORKS))
    args.copies = args.copies or [1, 4, 8]
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json: there is no folder {str(args.json.parent)!r}")
    return args


def main() -> int:
    args = options()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    facts = machine(device)
    passive = facts["omp_wait_policy"].upper() == "PASSIVE"
    policy = "this script's default: threads that spin slow down a shared machine" if passive else "as the user set it"
    print(
        f"torch {facts['torch']}, {facts['threads']} threads, {facts['cpu']}, {facts['device']}, {facts['date']}\n"
        f"OMP_WAIT_POLICY={facts['omp_wait_policy']} ({policy})"
    )
    if any(r in OPACUS for r in args.rivals) and missing("opacus"):
        print(f"Opacus is skipped: it is not installed; {INSTALL['opacus']}")
        args.rivals = tuple(r for r in args.rivals if r not in OPACUS)
    if args.autocast:
        print("autocast to bfloat16: sums are compared in fp32 as well")
    facts["matrix_product_gflop_per_second"] = matrix_gflops = matrix_product(device)
    print(f"fp32 matrix product: {matrix_gflops:.1f} GFLOP/s\n", flush=True)

    rows = (quick if args.quick else full)(args, device, matrix_gflops)
    flagged = [f"{r.network} K = {r.task.copies}: {n}" for r in rows for n in r.flagged]
    if args.json:
        choices = {k: v for k, v in vars(args).items() if k != "json"}
        report = {"machine": facts, "options": choices, "rows": [r.as_json() for r in rows]}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if flagged:
        print("WRONG SUMS: " + "; ".join(flagged), flush=True)
    if args.quick:
        print(json.dumps(summary(rows)), flush=True)
    return 1 if flagged else 0


if __name__ == "__main__":
    sys.exit(main())
