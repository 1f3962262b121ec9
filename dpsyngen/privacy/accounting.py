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
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

from dpsyngen.errors import ConfigError, require

Accountant = Literal["pld", "rdp"]

SMALLEST_EPSILON = 1e-3
"""The least ε that noise is calibrated to."""

LARGEST_GROUP = 1000
"""The most records of one person."""

_ETA = 1e-6  # the share of δ that pays for more records of a group in one step than are composed


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
    whole = [m for m in mechanisms if m.sampling_rate == 1]
    if sum(m.count for m in whole) < 2:
        return mechanisms
    noise = 1 / math.sqrt(sum(m.count / m.noise_multiplier**2 for m in whole))
    return (*(m for m in mechanisms if m.sampling_rate < 1), Mechanism(1.0, noise))


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


@lru_cache(maxsize=256)
def _one_step_rdp(sampling_rate: float, noise_multiplier: float) -> Any:
    """Rényi divergences of one step at dp-accounting's default orders; those of n steps are n times as large."""
    import dp_accounting as dp

    accountant = dp.rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
    event: Any = dp.GaussianDpEvent(noise_multiplier)
    with _quiet():
        accountant.compose(event if sampling_rate == 1 else dp.PoissonSampledDpEvent(sampling_rate, event))
    return accountant._rdp


@lru_cache(maxsize=8)
def _one_step_pld(sampling_rate: float, noise_multiplier: float, interval: float) -> Any:
    """Privacy loss distribution of one step, on a grid of losses with steps `interval`, rounded up."""
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(
        noise_multiplier, value_discretization_interval=interval, sampling_prob=sampling_rate
    )


def _group_step(m: Mechanism, delta: float, kinds: int, group_size: int, interval: float) -> Any:
    """Privacy loss distribution of one step when up to `group_size` records are added or removed at once.

    More than J of them in one step, for a J so large that this happens in none of the steps of `kinds` mechanisms but
    with probability η = 10⁻⁶ δ, is left to δ.
    """
    from dp_accounting.pld.privacy_loss_distribution import from_mixture_gaussian_mechanism
    from scipy.stats import binom

    q, most = m.sampling_rate, group_size
    while most > 1 and binom.sf(most - 1, group_size, q) * m.count * kinds <= _ETA * delta:
        most -= 1
    number = range(most + 1)
    chances = binom.pmf(number, group_size, q)
    chances /= chances.sum()
    shifts = [float(j) for j in number]
    return from_mixture_gaussian_mechanism(
        m.noise_multiplier, shifts, chances.tolist(), value_discretization_interval=interval
    )


def _interval(mechanisms: tuple[Mechanism, ...], delta: float, group_size: int) -> float:
    """Step of the grid of losses that suits a composition."""
    # The loss of one step shrinks as the steps grow; the grid must stay fine beside it, or rounding up each step's
    # loss adds up.  1e-4 is dp-accounting's own choice and right for hundreds of steps.
    steps = sum(m.count for m in mechanisms)
    interval = 1e-4 if steps <= 300 else 2e-5 if steps <= 5000 else 5e-6
    # Huge losses make a fine grid needlessly long: at a large ε a coarser one has the same relative error.
    rough = group_size * _epsilon(mechanisms, delta, "rdp")
    interval *= max(1.0, min(rough, 100.0))
    # Mixtures take ten times as long; this adds 0.02 % to ε at most where it was measured, and stays a bound.
    return interval if group_size == 1 else 8 * interval


@lru_cache(maxsize=256)
def _epsilon(
    mechanisms: tuple[Mechanism, ...],
    delta: float,
    kind: Accountant,
    group_size: int = 1,
    whole: tuple[Mechanism, ...] = (),
) -> float:
    if not mechanisms:
        return 0.0
    if any(m.noise_multiplier == 0 for m in mechanisms):
        return math.inf
    mechanisms = _one_gaussian(mechanisms)  # a convolution less for each
    if kind == "rdp":
        return _rdp_epsilon(mechanisms, delta, group_size)
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism, identity

    interval = _interval(_one_gaussian(whole) if whole else mechanisms, delta, group_size)

    # Composition is the convolution of privacy loss distributions; that of equal steps is a power in Fourier space.
    total = identity(interval)
    for m in mechanisms:
        if m.sampling_rate == 1:  # several Gaussians are one, and a group of g shifts it by g C
            noise = m.noise_multiplier / group_size / math.sqrt(m.count)
            total = total.compose(from_gaussian_mechanism(noise, value_discretization_interval=interval))
        elif group_size == 1:
            total = total.compose(_one_step_pld(m.sampling_rate, m.noise_multiplier, interval).self_compose(m.count))
        else:
            step = _group_step(m, delta, len(mechanisms), group_size, interval)
            total = total.compose(step.self_compose(m.count))
    if group_size == 1:
        return float(total.get_epsilon_for_delta(delta))
    # `total` is P₁, which has at most J of the group in each step; P has any number.  With P(S) <= P₁(S) + η and
    # P₁(S) <= P(S)/(1 - η), ε(δ - η) of P₁ plus -log(1 - η) holds for P.
    eta = _ETA * delta
    return float(total.get_epsilon_for_delta(delta - eta)) - math.log1p(-eta)


def _rdp_epsilon(mechanisms: tuple[Mechanism, ...], delta: float, group_size: int) -> float:
    if group_size > 1:
        return _group_lemma(lambda d: _epsilon(mechanisms, d, "rdp"), delta, group_size)
    from dp_accounting.rdp import rdp_privacy_accountant as rdp

    total = sum(m.count * _one_step_rdp(m.sampling_rate, m.noise_multiplier) for m in mechanisms)
    with _quiet():
        return float(rdp.compute_epsilon(rdp.DEFAULT_RDP_ORDERS, total, delta)[0])


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
    whole = isinstance(group_size, int) and not isinstance(group_size, bool)
    require(
        whole and 1 <= group_size <= LARGEST_GROUP,
        "group_size",
        group_size,
        f"a whole number from 1 to {LARGEST_GROUP}",
    )


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
    return _epsilon(merge(mechanisms), delta, accountant, group_size, merge(whole))


def calibrate_noise(
    target_epsilon: float,
    delta: float,
    *,
    sampling_rate: float,
    steps: int,
    spent: Iterable[Mechanism] = (),
    accountant: Accountant = "pld",
    tolerance: float = 3e-4,
    group_size: int = 1,
) -> float:
    """The smallest noise multiplier (to `tolerance`, relative) whose total cost is at most `target_epsilon`.

    Args:
        target_epsilon, delta: ε > 0 and δ in (0, 1).
        sampling_rate, steps: q in (0, 1], and how many steps.
        spent: earlier mechanisms on the same data, which the total includes.
        accountant: which bound to calibrate.
        tolerance: how far below the target the total may end, relative; it never ends above.
        group_size: g; the target is for up to g records together.

    Raises:
        ValueError: the target is below ``SMALLEST_EPSILON``, or the earlier mechanisms alone exceed it.
    """
    require(target_epsilon > 0, "target_epsilon", target_epsilon, "positive")
    if target_epsilon < SMALLEST_EPSILON:
        raise ValueError(
            f"target_epsilon is {target_epsilon:.3g}, below {SMALLEST_EPSILON}: so little lets nothing be learned, and "
            "the loss distribution is too fine to be computed."
        )
    spent = merge(spent)
    already = epsilon(spent, delta, accountant, group_size)
    if already >= target_epsilon:
        raise ValueError(f"ε = {already:.4g} is already spent, which leaves nothing of {target_epsilon:.4g}.")

    def cost(noise: float, kind: Accountant, group: int = group_size) -> float:
        return epsilon((*spent, Mechanism(sampling_rate, noise, steps)), delta, kind, group)

    def guess(noise: float) -> float:
        # A first guess for PLD need not be a bound, and g times ε is cheaper than the lemma.
        return group_size * cost(noise, "rdp", 1) if accountant == "pld" else cost(noise, "rdp")

    # RDP first, by bisection: an upper bound that takes milliseconds.  Its answer is a little too high for PLD, which
    # then takes a few evaluations.
    high = 1.0
    while guess(high) > target_epsilon and high < 1e7:  # ε falls with the noise: double until it fits, then bisect
        high *= 2
    low = high / 2
    while low > 0.01 and guess(low) <= target_epsilon:
        low, high = low / 2, low
    while high / low > 1 + tolerance:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if guess(middle) > target_epsilon else (low, middle)
    if accountant == "rdp":
        if cost(high, "rdp") > target_epsilon:
            raise ValueError(f"no noise multiplier below 1e7 reaches ε = {target_epsilon:.4g}.")
        return high
    return _refine(lambda noise: cost(noise, "pld"), target_epsilon, high, tolerance)


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


# --------------------------------------------------------------------------------- what a budget buys


@dataclass(frozen=True)
class PlanRow:
    """One plan and its cost: ε by both accountants, epochs (how often an image is used on average), and the standard
    deviation of the noise in a coordinate of the mean gradient, in units of C.
    """

    steps: int
    batch: int
    sampling_rate: float
    epochs: float
    noise_multiplier: float
    epsilon: float
    epsilon_by_rdp: float
    noise_a_step: float
    asked: bool


def neighbouring_plans(
    records: int,
    batch: int,
    steps: int,
    *,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    delta: float | None = None,
    group_size: int = 1,
) -> tuple[float, list[PlanRow]]:
    """What training costs, or what noise a budget needs, and how neighbouring plans compare.

    Args:
        records, batch, steps: number of private images n, expected batch (at most n), DP-SGD steps.
        epsilon, noise_multiplier: target ε, or z: exactly one of the two.
        delta, group_size: δ (None: :func:`default_delta`), and g: ε is for up to g records together.

    Returns:
        δ, and the plans, the one that was asked about first.
    """
    if (epsilon is None) == (noise_multiplier is None):
        raise ConfigError("give one of --epsilon (how much noise does it need?) and --noise (what does it cost?).")
    require(records >= 1, "records", records, "at least 1")
    require(steps >= 1, "steps", steps, "at least 1")
    require(1 <= batch <= records, "the batch", batch, f"from 1 to the {records:,} records")
    delta = default_delta(records) if delta is None else delta
    require(0 < delta < 1 / records, "delta", delta, f"above 0 and below 1/records = {1 / records:.3g}")
    ok = epsilon is None or SMALLEST_EPSILON <= epsilon < math.inf
    require(ok, "epsilon", epsilon, f"a positive number, {SMALLEST_EPSILON} at least")
    ok = noise_multiplier is None or 0 < noise_multiplier < math.inf
    require(ok, "the noise multiplier", noise_multiplier, "a positive number")
    check_group_size(group_size)

    plans = [(steps, batch)]
    plans += [(max(1, steps // 2), batch), (steps * 2, batch)]
    plans += [(steps, b) for b in (max(1, batch // 2), batch * 2) if b <= records]
    rows = []
    for number, (t, b) in enumerate(dict.fromkeys(plans)):
        q = b / records
        z = noise_multiplier or calibrate_noise(epsilon or 0.0, delta, sampling_rate=q, steps=t, group_size=group_size)
        m = (Mechanism(q, z, t),)
        by_pld, by_rdp = _epsilon(m, delta, "pld", group_size), _epsilon(m, delta, "rdp", group_size)
        rows.append(PlanRow(t, b, q, q * t, z, by_pld, by_rdp, z / b, number == 0))
    return delta, rows


def plan_lines(records: int, group_size: int, delta: float, rows: list[PlanRow]) -> Iterator[str]:
    """:func:`neighbouring_plans` as a table for people."""
    unit = "one image = one record" if group_size == 1 else f"up to {group_size} images of one person together"
    yield from (
        f"{records:,} records, {unit}, add/remove; δ = {delta:.3g}",
        "Poisson-subsampled Gaussian mechanism; ε by PLD (upper bound), beside it by Rényi DP",
        "",
        f"{'steps':>8} {'batch':>8} {'rate':>9} {'epochs':>8} {'noise z':>9} {'ε PLD':>9} {'ε RDP':>9} "
        f"{'noise a step':>13}",
    )
    for r in rows:
        yield (
            f"{r.steps:>8,} {r.batch:>8,} {r.sampling_rate:>9.5f} {r.epochs:>8.1f} {r.noise_multiplier:>9.4f} "
            f"{r.epsilon:>9.4f} {r.epsilon_by_rdp:>9.4f} {r.noise_a_step:>11.6f} C{'  <- asked' if r.asked else ''}"
        )
    yield from (
        "",
        "epochs: how often an image is used on average.  noise a step: standard deviation of the noise in each",
        "coordinate of the mean gradient, in units of the clipping norm C; lower is better for the same steps.",
    )
