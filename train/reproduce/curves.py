"""The arithmetic of a reproduction: compares frontiers at the same L0, with intervals over seeds. No files, no torch.

A frontier here belongs to one seed: its points over λ, sorted by L0 and joined by straight lines in log L0. Two arms
are compared seed by seed, only in the range of L0 that every frontier covers (the overlap). Nothing is extrapolated.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

STUDENT: Final = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""The 97.5 % quantile of Student's t for 1 to 30 degrees of freedom."""
NORMAL: Final = 1.96
"""The 97.5 % quantile of the normal distribution, for more degrees of freedom."""


@dataclass(frozen=True)
class ArmMeasurement:
    """Measurements of one autoencoder on held-out tokens; None for what was not measured or is not finite."""

    arm: str
    seed: int
    name: str
    d_sae: int
    setting: float
    """The autoencoder's λ or k."""
    l0: float | None
    r2: float | None
    dead: float | None
    bipolar: float | None = None
    concentration: float | None = None
    """The share of bipolar latents among the tenth of live latents that fires most, minus their share among all."""
    loss_recovered: float | None = None
    bipolar_energy: float | None = None
    """The share of live latents with more than a tenth of their energy on the weaker side."""
    nameable: float | None = None
    """The share of latents that have a lexical name for both poles; see `train.reproduce.look`."""
    dial: float | None = None
    """The share of the tested latents that are a dial."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95 % t interval. With one seed, `low` and `high` are None."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class MatchedArms:
    """Arm a minus arm b over the overlap. The difference at each L0 has an interval over seeds."""

    l0_low: float
    l0_high: float
    mean: Interval
    """The mean over log L0."""
    lowest: Interval
    """The difference at the L0 where its mean over seeds is lowest."""
    lowest_l0: float
    floor: float | None
    """The lowest lower end of the intervals at any L0. Above zero, a is ahead throughout."""
    highest: Interval
    highest_l0: float
    ahead: float
    """Share of the overlap, in log L0, where the mean over seeds is above zero."""


@dataclass(frozen=True)
class SeedFrontier:
    """One seed's values over log L0, with straight lines between points."""

    log_l0: Floats
    value: Floats

    def at(self, log_l0: Floats) -> Floats:
        return np.asarray(np.interp(log_l0, self.log_l0, self.value), dtype=np.float64)


Frontiers = Mapping[int, SeedFrontier]
"""The frontier of each seed of an arm."""


def interval(values: Sequence[float]) -> Interval | None:
    """Returns the mean of `values` and its 95 % t interval; None without values."""
    n = len(values)
    if not n:
        return None
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    t = STUDENT[n - 2] if n - 2 < len(STUDENT) else NORMAL
    half = t * math.sqrt(variance / n)
    return Interval(mean, mean - half, mean + half, n)


def mapped(found: Interval, function: Callable[[float], float]) -> Interval:
    """Applies a rising function to a mean and its interval."""
    low, high = (None if end is None else function(end) for end in (found.low, found.high))
    return Interval(function(found.mean), low, high, found.n)


def magnitude_of(found: Interval) -> Interval:
    """Returns the magnitude of a difference. The interval's upper end is the end farthest from zero."""
    if found.low is None or found.high is None:
        return Interval(abs(found.mean), None, None, found.n)
    nearest = 0.0 if found.low <= 0 <= found.high else min(abs(found.low), abs(found.high))
    return Interval(abs(found.mean), nearest, max(abs(found.low), abs(found.high)), found.n)


def frontiers(points: Sequence[ArmMeasurement], field: str) -> dict[int, SeedFrontier]:
    """Returns the frontier of each seed that has a point. Points with L0 = 0 have no logarithm and are left out; points
    with equal L0 are averaged."""
    known: dict[int, dict[float, list[float]]] = {}
    for point in points:
        value = getattr(point, field)
        if point.l0 and point.l0 > 0 and value is not None and math.isfinite(value) and math.isfinite(point.l0):
            known.setdefault(point.seed, {}).setdefault(math.log(point.l0), []).append(value)
    return {
        seed: SeedFrontier(np.array(sorted(by_l0)), np.array([np.mean(by_l0[x]) for x in sorted(by_l0)]))
        for seed, by_l0 in sorted(known.items())
    }


def overlap(*arms: Frontiers) -> tuple[float, float] | None:
    """Returns the range of log L0 that every frontier of every arm covers, or None."""
    every = [frontier for arm in arms for frontier in arm.values()]
    if not all(arms) or not every:
        return None
    low = max(float(frontier.log_l0[0]) for frontier in every)
    high = min(float(frontier.log_l0[-1]) for frontier in every)
    return (low, high) if low <= high else None


def paired(a: Frontiers, b: Frontiers) -> tuple[dict[int, SeedFrontier], dict[int, SeedFrontier]]:
    """Returns both arms, restricted to the seeds that both have."""
    return {seed: a[seed] for seed in a if seed in b}, {seed: b[seed] for seed in b if seed in a}


def knots(span: tuple[float, float], *arms: Frontiers) -> Floats:
    """Returns the ends of the span and every log L0 inside it at which a frontier has a point. All frontiers are
    straight between them."""
    low, high = span
    inside = {float(x) for arm in arms for frontier in arm.values() for x in frontier.log_l0 if low < x < high}
    return np.array(sorted({low, high} | inside))


def compare(a: Frontiers, b: Frontiers) -> MatchedArms | None:
    """Returns arm a minus arm b at matched L0, seed by seed; None when they have no seed or no L0 in common."""
    a, b = paired(a, b)
    span = overlap(a, b)
    if span is None:
        return None
    log_l0 = knots(span, a, b)
    differences = np.array([a[seed].at(log_l0) - b[seed].at(log_l0) for seed in a])
    each = [interval(column.tolist()) for column in differences.T]
    known = [found for found in each if found is not None]
    means = np.array([found.mean for found in known])
    worst, best = int(means.argmin()), int(means.argmax())
    overall = interval([average(row, log_l0) for row in differences])
    assert overall is not None  # there is a seed
    return MatchedArms(
        l0_low=math.exp(span[0]),
        l0_high=math.exp(span[1]),
        mean=overall,
        lowest=known[worst],
        lowest_l0=math.exp(log_l0[worst]),
        floor=min((found.low for found in known if found.low is not None), default=None),
        highest=known[best],
        highest_l0=math.exp(log_l0[best]),
        ahead=share_above(means, log_l0),
    )


def average(values: Floats, log_l0: Floats) -> float:
    """Returns the mean over log L0 of a curve that is straight between the knots."""
    width = float(log_l0[-1] - log_l0[0])
    return float(np.trapezoid(values, log_l0) / width) if width > 0 else float(values[0])


def share_above(values: Floats, log_l0: Floats) -> float:
    """Returns the share of the range where a curve that is straight between the knots is above zero."""
    if len(log_l0) == 1:
        return float(values[0] > 0)
    above = 0.0
    for (x0, y0), (x1, y1) in pairwise(zip(log_l0.tolist(), values.tolist(), strict=True)):
        if y0 * y1 < 0:
            above += (x1 - x0) * max(y0, y1) / abs(y1 - y0)
        elif max(y0, y1) > 0:
            above += x1 - x0
    return above / float(log_l0[-1] - log_l0[0])


def nearest(target: float, span: tuple[float, float]) -> float:
    """Returns the logarithm of the target L0, or the nearest log L0 in the span."""
    return min(max(math.log(target), span[0]), span[1])


def value_at(arm: Frontiers, log_l0: float) -> Interval | None:
    """Returns the value at an L0 over the seeds that reach it."""
    near = 1e-9
    reaching = [f for f in arm.values() if f.log_l0[0] - near <= log_l0 <= f.log_l0[-1] + near]
    return interval([float(frontier.at(np.array([log_l0]))[0]) for frontier in reaching])


def geometric_ratio(over: Frontiers, under: Frontiers, floor: float) -> tuple[Interval, str] | None:
    """Returns the geometric mean over log L0 of over / under, seed by seed, and how it bounds the true ratio. Values
    below `floor` count as `floor`, so that zero has a logarithm. If that raised only values of `under`, the ratio is a
    lower bound (≥); if only values of `over`, an upper bound (≤); if both, an approximation (≈); else exact ("")."""
    over, under = paired(over, under)
    span = overlap(over, under)
    if span is None:
        return None
    log_l0 = knots(span, over, under)
    logs, raised_over, raised_under = [], False, False
    for seed in over:
        top, bottom = over[seed].at(log_l0), under[seed].at(log_l0)
        raised_over |= bool((top < floor).any())
        raised_under |= bool((bottom < floor).any())
        logs.append(average(np.log(np.maximum(top, floor) / np.maximum(bottom, floor)), log_l0))
    found = interval(logs)
    sign = ("≈" if raised_over else "≥") if raised_under else ("≤" if raised_over else "")
    return None if found is None else (mapped(found, math.exp), sign)


def against(points: Sequence[ArmMeasurement], reference: Frontiers, field: str) -> Interval | None:
    """Returns the points minus the reference frontier of the same seed at the same L0: the mean within each seed, then
    over seeds. Points at an L0 that the reference does not reach are left out."""
    by_seed: dict[int, list[float]] = {}
    for seed, frontier in frontiers(points, field).items():
        if seed not in reference:
            continue
        same_seed = reference[seed]
        inside = (frontier.log_l0 >= same_seed.log_l0[0]) & (frontier.log_l0 <= same_seed.log_l0[-1])
        if inside.any():
            by_seed[seed] = (frontier.value - same_seed.at(frontier.log_l0))[inside].tolist()
    return interval([float(np.mean(values)) for values in by_seed.values()])
