"""What a privacy budget buys: a table to look at before anything is spent."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dpsyngen.errors import ConfigError
from dpsyngen.privacy import accounting
from dpsyngen.privacy.accounting import Accountant, Mechanism, calibrate_noise, check_group_size, default_delta


@dataclass(frozen=True)
class PlanRow:
    """One plan and its cost.

    Attributes:
        steps, batch: DP-SGD steps, expected batch.
        sampling_rate: q.
        epochs: how often an image is used on average.
        noise_multiplier: z.
        epsilon, epsilon_by_rdp: upper bounds.
        noise_a_step: standard deviation of the noise in a coordinate of the mean gradient, in units of C.
        asked: whether it is the plan that was asked about, or a neighbour.
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
        records: number of private images n.
        batch: expected batch, at most n.
        steps: DP-SGD steps.
        epsilon: target ε; exactly one of this and `noise_multiplier`.
        noise_multiplier: z.
        delta: δ; None: :func:`default_delta`.
        group_size: g; ε is for up to g records together.

    Returns:
        δ, and the plans, the one that was asked about first.

    Raises:
        ConfigError: a value that is not allowed.
    """
    if (epsilon is None) == (noise_multiplier is None):
        raise ConfigError("give one of --epsilon (how much noise does it need?) and --noise (what does it cost?).")
    if records < 1 or steps < 1 or batch < 1:
        raise ConfigError(f"records={records}, batch={batch} and steps={steps} must be at least 1.")
    if batch > records:
        raise ConfigError(f"the batch is {batch}, but there are only {records:,} records.")
    delta = default_delta(records) if delta is None else delta
    if not 0 < delta < 1 / records:
        raise ConfigError(f"delta is {delta:.3g}, but must be above 0 and below 1/records = {1 / records:.3g}.")
    if epsilon is not None and not accounting.SMALLEST_EPSILON <= epsilon < math.inf:
        raise ConfigError(
            f"epsilon is {epsilon}, but must be a positive number, {accounting.SMALLEST_EPSILON} at least."
        )
    if noise_multiplier is not None and not 0 < noise_multiplier < math.inf:
        raise ConfigError(f"the noise multiplier is {noise_multiplier}, but must be a positive number.")
    try:
        check_group_size(group_size)
    except ValueError as error:
        raise ConfigError(str(error)) from None

    plans = [(steps, batch)]
    plans += [(max(1, steps // 2), batch), (steps * 2, batch)]
    plans += [(steps, b) for b in (max(1, batch // 2), batch * 2) if b <= records]
    rows = []
    for number, (t, b) in enumerate(dict.fromkeys(plans)):
        q = b / records
        z = noise_multiplier
        if z is None:
            assert epsilon is not None
            z = calibrate_noise(epsilon, delta, sampling_rate=q, steps=t, group_size=group_size)
        m = Mechanism(q, z, t)
        by_pld, by_rdp = _eps(m, delta, "pld", group_size), _eps(m, delta, "rdp", group_size)
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


def _eps(mechanism: Mechanism, delta: float, accountant: Accountant, group_size: int) -> float:
    return accounting.epsilon([mechanism], delta, accountant, group_size)
