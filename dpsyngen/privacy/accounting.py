"""What a set of mechanisms costs: (ε, δ) from events, and the noise that a target ε needs.

All figures come from dp-accounting: the privacy loss distribution (PLD) accountant, whose result is an upper bound
up to its discretisation, with Rényi DP (RDP) as a looser cross-check.  No central-limit approximation anywhere.
Adjacency is add/remove one record, with the sampling rate and the normaliser fixed as public constants by the
*declared* number of records; the subsampled Gaussian mechanism costs the same under zero-out adjacency.

A group of up to g records (all images of one person) may be added or removed together.  Under Poisson sampling a step
then sees j of them with probability Binomial(g, q)(j), and their clipped gradients move the sum by at most j C.  Such a
mixture of Gaussians is dominated by its one-dimensional case with the shifts 0, C, ..., gC (Choquette-Choo, Ganesh,
Steinke, Thakurta, "Privacy Amplification for Matrix Mechanisms", ICLR 2024), which PLD composes: far tighter than g
times ε.  Rényi DP goes by the general lemma instead (Vadhan, "The Complexity of Differential Privacy", 2017, lemma
2.2), as a cross-check that shares nothing with it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any, Literal

from dpsyngen.errors import require

Accountant = Literal["pld", "rdp"]

SMALLEST_EPSILON = 1e-3
"""The least ε that noise is calibrated to."""

LARGEST_GROUP = 1000
"""The most records of one person."""

LEAST_NOISE = 1e-6
"""With less noise ε is counted as infinite."""

# What a privacy loss distribution may cost, 1.6 GB and half a minute: points of single steps (200 bytes and 2 µs each;
# those of mixtures take _MIXTURE times as long), losses of all steps (64 bytes each), step of the grid, and ε.
_MOST_POINTS, _MIXTURE, _MOST_LOSSES, _COARSEST, _LARGEST_EPSILON = 1 << 22, 10, 1 << 25, 1.0, 10_000

_ETA = 1e-6  # the share of δ that pays for more records of a group in one step than are composed
_KEPT = 4096  # answers: a calibration takes a dozen, and a grid goes through its settings again for each seed

# Rényi orders that tell where a search begins and which grid suits, instead of dp-accounting's 156: each is a loop in
# Python.  ε is a bound by any orders and on any grid of losses, so which they are decides the last digits alone.
_ROUGH_ORDERS = (1.1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 128, 512)


@dataclass(frozen=True)
class Mechanism:
    """`count` >= 1 runs of a (Poisson-subsampled) Gaussian mechanism.

    Attributes:
        sampling_rate: q in (0, 1]; 1 means that every record is used.
        noise_multiplier: z, noise standard deviation over L2 sensitivity; 0 is no privacy.
    """

    sampling_rate: float
    noise_multiplier: float
    count: int = 1

    def __post_init__(self) -> None:
        require(0 < self.sampling_rate <= 1, "sampling_rate", self.sampling_rate, "in (0, 1]")
        require(self.noise_multiplier >= 0, "noise_multiplier", self.noise_multiplier, ">= 0")
        require(self.count >= 1, "count", self.count, ">= 1")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def merge(mechanisms: Iterable[Mechanism]) -> tuple[Mechanism, ...]:
    """The same composition with equal mechanisms counted together, in a fixed order."""
    counts: dict[tuple[float, float], int] = {}
    for m in mechanisms:
        key = (m.sampling_rate, m.noise_multiplier)
        counts[key] = counts.get(key, 0) + m.count
    return tuple(Mechanism(q, z, n) for (q, z), n in sorted(counts.items()))


def _one_gaussian(mechanisms: tuple[Mechanism, ...]) -> tuple[Mechanism, ...]:
    """The same composition with all mechanisms that use every record as a single one: Σ count/z² = 1/z².

    Exact, by a rotation: the dominating pair of several Gaussian mechanisms is a pair of Gaussians with as many
    coordinates, which differ along one direction only.  It saves the accountant a convolution for each.
    """
    whole = tuple(m for m in mechanisms if m.sampling_rate == 1)
    if sum(m.count for m in whole) < 2 or min(m.noise_multiplier for m in whole) < LEAST_NOISE:
        return mechanisms
    return (*(m for m in mechanisms if m.sampling_rate < 1), Mechanism(1.0, _noise_of_all(whole)))


@contextmanager
def _quiet() -> Iterator[None]:
    """dp-accounting warns for each Rényi order that it leaves out; the bound holds with the orders that remain."""
    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


@lru_cache(maxsize=_KEPT)
def _one_step_rdp(sampling_rate: float, noise_multiplier: float, orders: tuple[float, ...] | None) -> Any:
    """Rényi divergences of one step at `orders`, or dp-accounting's own; those of n steps are n times as large."""
    import dp_accounting as dp

    if noise_multiplier < 0.01:
        sampling_rate = 1.0  # sampling makes no difference that counts any more, but takes a long sum
    accountant = dp.rdp.RdpAccountant(orders, neighboring_relation=dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
    event: Any = dp.GaussianDpEvent(min(noise_multiplier, 1e9))  # less noise, whose square is an ordinary number
    with _quiet():
        accountant.compose(event if sampling_rate == 1 else dp.PoissonSampledDpEvent(sampling_rate, event))
    return accountant._rdp


def _most_in_a_step(m: Mechanism, delta: float, kinds: int, group_size: int) -> int:
    """J: more than J records of a group are in one of the steps of `kinds` mechanisms with probability
    η = 10⁻⁶ δ at most, which is left to δ.
    """
    from scipy.stats import binom

    most = group_size
    while most > 1 and binom.sf(most - 1, group_size, m.sampling_rate) * m.count * kinds <= _ETA * delta:
        most -= 1
    return most


@lru_cache(maxsize=2)
def _one_step_pld(rate: float, noise: float, most: int, group_size: int, interval: float) -> Any:
    """Privacy loss distribution of one step, on a grid of losses with steps `interval`, rounded up, when up to
    `group_size` records, `most` of them in one step, are added or removed at once.
    """
    from dp_accounting.pld import privacy_loss_distribution as pld
    from scipy.stats import binom

    if group_size == 1:
        return pld.from_gaussian_mechanism(noise, value_discretization_interval=interval, sampling_prob=rate)
    shifts = [float(j) for j in range(most + 1)]
    chances = binom.pmf(shifts, group_size, rate)
    chances = (chances / chances.sum()).tolist()
    return pld.from_mixture_gaussian_mechanism(noise, shifts, chances, value_discretization_interval=interval)


def _interval(mechanisms: tuple[Mechanism, ...], rough: float, group_size: int) -> float:
    """Step of the grid of losses that suits a composition that costs about `rough`."""
    # The loss of one step shrinks as the steps grow; the grid must stay fine beside it, or rounding up each step's
    # loss adds up.  1e-4 is dp-accounting's own choice and right for hundreds of steps.
    steps = sum(m.count for m in mechanisms)
    interval = 1e-4 if steps <= 300 else 2e-5 if steps <= 5000 else 5e-6
    # Huge losses make a fine grid needlessly long: at a large ε a coarser one has the same relative error.
    interval *= max(1.0, min(rough, 100.0))
    # Mixtures take ten times as long; this adds 0.02 % to ε at most where it was measured, and stays a bound.
    return interval if group_size == 1 else 8 * interval


def _noise_of_all(mechanisms: tuple[Mechanism, ...]) -> float:
    """Noise multiplier of the single Gaussian mechanism that all together are, if every record is in every step."""
    return 1 / math.hypot(*(math.sqrt(m.count) / m.noise_multiplier for m in mechanisms))


def _length(losses: Any, count: int) -> float:
    """About how many losses `count` steps have, by the Chernoff bounds at which dp-accounting cuts."""
    import numpy as np
    from scipy.special import logsumexp

    chances = losses._probs
    size, block = len(chances), -(-len(chances) // 4096)
    starts = np.arange(0, size, block)
    orders = np.arange(1, 21)[:, None] / size * np.array([[[1.0]], [[-1.0]]])
    means = logsumexp(orders * (starts + (block - 1) / 2), axis=2, b=np.add.reduceat(chances, starts), keepdims=True)
    upper, lower = (count * means + math.log(2e15)) / orders
    return float(max(size, min(upper.min(), count * (size - 1)) - max(lower.max(), 0)))


def _composed(mechanisms: tuple[Mechanism, ...], most: list[int], group_size: int, interval: float) -> Any:
    """Privacy loss distribution of all on one grid, rounded up; None where it would have too many points."""
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution, from_gaussian_mechanism, identity

    parts, length = [], 0.0
    for m, j in zip(mechanisms, most, strict=True):
        if m.sampling_rate == 1:  # one Gaussian, see _one_gaussian, which a group of g shifts by g C
            noise = m.noise_multiplier / group_size
            parts.append(from_gaussian_mechanism(noise, value_discretization_interval=interval))
            continue
        step = _one_step_pld(m.sampling_rate, m.noise_multiplier, j, group_size, interval)
        ways = step._pmf_remove.to_dense_pmf(), step._pmf_add.to_dense_pmf()
        length += sum(_length(way, m.count) for way in ways)
        if length > _MOST_LOSSES:
            return None
        # Composition is the convolution of privacy loss distributions; that of equal steps is a power in Fourier space.
        # (Dense: of a sparse one dp-accounting would compute size to the power of count, digit by digit.)
        parts.append(PrivacyLossDistribution(*ways).self_compose(m.count) if m.count > 1 else step)
    total = identity(interval)
    for part in parts:
        total = total.compose(part)
    return total


@dataclass(frozen=True, order=True)
class Bound:
    """An upper bound on ε, and `by` which accountant and on which grid it was computed."""

    epsilon: float
    by: str


def _quick_bound(mechanisms: tuple[Mechanism, ...], delta: float, group_size: int, why: str) -> Bound:
    """The smaller of two upper bounds that take milliseconds."""
    from scipy.special import ndtri

    # Sampling leaves less to see, so all are at most the Gaussian with μ = g/z in which every record is in every step.
    # Its δ(ε) is below P(loss > ε), the loss being normal with mean μ²/2 and standard deviation μ.
    mu = group_size / _noise_of_all(mechanisms)
    gaussian = max(0.0, (mu * mu / 2 - mu * float(ndtri(delta))) * (1 + 1e-12))
    renyi = _rdp_epsilon(mechanisms, delta, group_size)
    if renyi <= gaussian:
        return Bound(renyi, f"Rényi DP (upper bound; {why}), dp-accounting")
    return Bound(gaussian, f"closed form of the Gaussian mechanism without sampling (upper bound; {why})")


@lru_cache(maxsize=_KEPT)
def _bound(
    mechanisms: tuple[Mechanism, ...], delta: float, group_size: int, whole: tuple[Mechanism, ...], coarser: int = 1
) -> Bound:
    """By the privacy loss distribution, on the grid that suits (or a `coarser` one, which takes as much less time), or
    the finest that is not too large; else quickly.
    """
    if not mechanisms:
        return Bound(0.0, "nothing was used")
    if any(m.noise_multiplier < LEAST_NOISE for m in mechanisms):
        return Bound(math.inf, f"a noise multiplier is below {LEAST_NOISE:g}")
    mechanisms = _one_gaussian(mechanisms)  # a convolution less for each
    whole = _one_gaussian(whole) if whole else mechanisms
    rough = group_size * _rdp_epsilon(whole, delta, 1, _ROUGH_ORDERS)
    if rough > _LARGEST_EPSILON:
        return _quick_bound(mechanisms, delta, group_size, f"beyond ε = {_LARGEST_EPSILON:,} nothing finer is computed")
    suits = _interval(whole, rough, group_size)
    interval = suits * coarser
    most = [_most_in_a_step(m, delta, len(mechanisms), group_size) for m in mechanisms]
    points = 0.0  # of the grid, times its step: noise is cut at 10 z, and a mixture is searched for each of its points
    for m, j in zip(mechanisms, most, strict=True):
        loss = j / m.noise_multiplier
        points += (loss * loss + 20 * loss) * (1 if m.sampling_rate == 1 or group_size == 1 else _MIXTURE)
    while points / interval > _MOST_POINTS:
        interval *= 2  # the coarser grid is a part of the finer, so what it gives is never below
    # P₁ has at most J of the group in each step; P has any number.  With P(S) <= P₁(S) + η and P₁(S) <= P(S)/(1 - η),
    # ε(δ - η) of P₁ plus -log(1 - η) holds for P.
    eta = 0.0 if group_size == 1 else _ETA * delta
    why = "the privacy loss distribution would be too large"
    while interval <= _COARSEST:
        try:
            total = _composed(mechanisms, most, group_size, interval)
            if total is None:
                interval *= 2
                continue
            value = float(total.get_epsilon_for_delta(delta - eta)) - math.log1p(-eta)
        except (ValueError, ArithmeticError, MemoryError):  # dp-accounting's, on extreme mixtures
            value = math.inf
        if value < math.inf:
            saving = (
                "" if interval == suits * coarser else f", {interval / suits:g} times coarser than usual to save memory"
            )
            by = f"privacy loss distribution (upper bound, losses in steps of {interval:.3g}{saving}), dp-accounting"
            found = Bound(value, by)
            return min(found, _quick_bound(mechanisms, delta, group_size, why)) if saving else found
        why = "δ is below what the privacy loss distribution resolves"
        break
    return _quick_bound(mechanisms, delta, group_size, why)


@lru_cache(maxsize=_KEPT)
def _rdp_epsilon(
    mechanisms: tuple[Mechanism, ...], delta: float, group_size: int, orders: tuple[float, ...] | None = None
) -> float:
    if not mechanisms or any(m.noise_multiplier < LEAST_NOISE for m in mechanisms):
        return math.inf if mechanisms else 0.0
    if group_size > 1:
        return _group_lemma(lambda d: _rdp_epsilon(mechanisms, d, 1, orders), delta, group_size)
    from dp_accounting.rdp import rdp_privacy_accountant as rdp

    total = sum(m.count * _one_step_rdp(m.sampling_rate, m.noise_multiplier, orders) for m in mechanisms)
    with _quiet():
        return float(rdp.compute_epsilon(orders or rdp.DEFAULT_RDP_ORDERS, total, delta)[0])


def _group_lemma(epsilon_at: Callable[[float], float], delta: float, group_size: int) -> float:
    """ε for a group at `delta`, from ε for one record as a function of δ.

    (ε, δ') for one record is (gε, δ' (e^{gε} - 1)/(e^ε - 1)) for g of them.  The largest δ' that ends at or below
    `delta` is searched for, as ε falls with δ'.
    """

    def log_total(log_one: float) -> float:
        e = epsilon_at(math.exp(log_one))
        if e == 0:
            return log_one + math.log(group_size)
        # log((e^{ge} - 1) / (e^e - 1)) without overflow
        return log_one + (group_size - 1) * e + math.log(-math.expm1(-group_size * e)) - math.log(-math.expm1(-e))

    target = math.log(delta)
    low, high = -700.0, target - math.log(group_size)
    if log_total(low) > target:
        return math.inf
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if log_total(middle) <= target else (low, middle)
    return group_size * epsilon_at(math.exp(low))


def check_group_size(group_size: int) -> None:
    """Raise ConfigError unless it is a whole number in 1 .. LARGEST_GROUP."""
    ok = isinstance(group_size, int) and not isinstance(group_size, bool) and 1 <= group_size <= LARGEST_GROUP
    require(ok, "group_size", group_size, f"a whole number from 1 to {LARGEST_GROUP}")


def epsilon(
    mechanisms: Iterable[Mechanism],
    delta: float,
    accountant: Accountant = "pld",
    group_size: int = 1,
    whole: Iterable[Mechanism] = (),
) -> float:
    """An upper bound on ε at `delta` of running all `mechanisms` on the same data.

    Args:
        mechanisms: what was run, adaptively, in any order.
        delta, group_size: δ in (0, 1), and g: the bound is for adding or removing up to g records together.
        accountant: "pld" (tight) or "rdp" (looser, a cross-check).
        whole: of what run `mechanisms` are a part.  Its parts are then computed on its grid of losses, which takes the
            distribution of one step only once; each is an upper bound all the same.
    """
    require(0 < delta < 1, "delta", delta, "in (0, 1)")
    check_group_size(group_size)
    merged = merge(mechanisms)
    if accountant == "rdp":
        return _rdp_epsilon(_one_gaussian(merged), delta, group_size)
    return _bound(merged, delta, group_size, merge(whole)).epsilon


def epsilon_bound(mechanisms: Iterable[Mechanism], delta: float, group_size: int = 1) -> Bound:
    """:func:`epsilon` by "pld", with how it was computed.

    A privacy loss distribution that would take more than 1.6 GB is computed on a coarser grid; where no grid helps,
    the smaller of two quick bounds takes its place: Rényi DP, and the Gaussian mechanism without sampling.
    """
    require(0 < delta < 1, "delta", delta, "in (0, 1)")
    check_group_size(group_size)
    return _bound(merge(mechanisms), delta, group_size, ())


def calibrate_noise(
    target_epsilon: float,
    delta: float,
    *,
    sampling_rate: float,
    steps: int,
    spent: Iterable[Mechanism] = (),
    tolerance: float = 3e-4,
    group_size: int = 1,
) -> float:
    """The smallest noise multiplier (to `tolerance`, relative) whose total cost is at most `target_epsilon`.

    Args:
        target_epsilon, delta, group_size: ε > 0, δ in (0, 1), and g: the target is for up to g records together.
        sampling_rate, steps: q in (0, 1], and how many steps.
        spent: earlier mechanisms on the same data, which the total includes.
        tolerance: how far below the target the total may end, relative; it never ends above.

    Raises:
        ValueError: the target is below ``SMALLEST_EPSILON``, or the earlier mechanisms alone exceed it.
    """
    require(target_epsilon > 0, "target_epsilon", target_epsilon, "positive")
    if target_epsilon < SMALLEST_EPSILON:
        raise ValueError(
            f"ε = {target_epsilon:.3g} is below {SMALLEST_EPSILON}: so little lets nothing be learned, and "
            "the loss distribution is too fine to be computed."
        )
    spent = merge(spent)
    already = epsilon(spent, delta, group_size=group_size)
    if already >= target_epsilon:
        raise ValueError(f"ε = {already:.4g} is already spent, which leaves nothing of {target_epsilon:.4g}.")

    def together(noise: float) -> tuple[Mechanism, ...]:
        return merge((*spent, Mechanism(sampling_rate, noise, steps)))

    def cost(noise: float, coarser: int = 1) -> float:
        return _bound(together(noise), delta, group_size, (), coarser).epsilon

    # Each search begins where a cheaper one ended.  A guess need not be a bound, and g times ε is cheaper than the
    # lemma; what fits on a coarse grid fits on the fine one, mostly within the tolerance.
    start = 1.0
    for guess, near in (
        (lambda noise: group_size * _rdp_epsilon(_one_gaussian(together(noise)), delta, 1, _ROUGH_ORDERS), 0.03),
        (partial(cost, coarser=8), tolerance / 3),
    ):
        with suppress(ValueError):  # both are looser than what counts, and may find no room beside `spent`
            start = _refine(guess, target_epsilon, start, near)
    return _refine(cost, target_epsilon, start, tolerance)


def _refine(cost: Callable[[float], float], target: float, start: float, tolerance: float) -> float:
    """The smallest noise at which a falling, costly `cost` meets `target`, from a guess, in few evaluations.

    log ε is almost a straight line in log z near the answer, so each guess is taken from the secant of the last two.
    Where δ alone pays for a lot of noise ε drops to 0 and there is no such line: then the interval is halved.
    The result always satisfies cost(result) <= target.
    """
    z, e = start, cost(start)
    fits: float | None = z if e <= target else None
    fails: float | None = None if e <= target else z
    slope = -1.2
    for _ in range(40):
        if fits is not None and target * (1 - tolerance) <= cost(fits):
            return fits
        if 0 < e < math.inf:
            # Aim a little below the target, so that the guess fits when the line is right.
            guess = z * math.exp((math.log(target * (1 - tolerance / 3)) - math.log(e)) / slope)
            guess = min(max(guess, z / 2), z * 2)
        else:
            guess = z / 2 if e == 0 else z * 2
        if fits is not None and fails is not None:
            if fits / fails <= 1 + tolerance / 100:
                return fits
            if not fails < guess < fits:
                guess = math.sqrt(fails * fits)
        e_guess = cost(guess)
        if guess != z and 0 < e < math.inf and 0 < e_guess < math.inf and e_guess != e:
            slope = min(math.log(e_guess / e) / math.log(guess / z), -0.1)
        z, e = guess, e_guess
        if e > target and (fails is None or z > fails):
            fails = z
        if e <= target and (fits is None or z < fits):
            fits = z
    if fits is None:
        raise ValueError(f"no noise multiplier was found that reaches ε = {target:.4g}.")
    return fits


def default_delta(records: int) -> float:
    """The largest power of ten below 1/records (Fashion-MNIST's 60,000: 1e-5)."""
    exponent = math.floor(-math.log10(records))
    delta = 10.0**exponent
    return delta if delta < 1 / records else delta / 10
