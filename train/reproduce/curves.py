"""The arithmetic of a reproduction: frontiers compared at the same L0, with intervals over seeds. No files, no torch.

A frontier here is one seed's: its points over λ, by rising L0, joined by straight lines in log L0. Two arms are
compared seed by seed, only where every one of their frontiers has an L0 (the overlap); nothing is extrapolated.
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
"""The 97.5 % quantile of Student's t for 1, 2, … degrees of freedom."""
NORMAL: Final = 1.96
"""The same beyond that table."""


@dataclass(frozen=True)
class ArmMeasurement:
    """One autoencoder on held-out tokens. What diverged or was not measured is None."""

    arm: str
    seed: int
    name: str
    d_sae: int
    setting: float
    """λ, or k."""
    l0: float | None
    r2: float | None
    dead: float | None
    bipolar: float | None = None
    concentration: float | None = None
    """Of the tenth of the live latents that fires most, the share that is bipolar, minus that of all."""
    loss_recovered: float | None = None


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95 % t interval; no interval (None) with one seed."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class MatchedArms:
    """Arm a minus arm b over the overlap. At each L0 there is an interval over seeds."""

    l0_low: float
    l0_high: float
    mean: Interval
    """Of the mean over log L0."""
    lowest: Interval
    """Where the seeds' mean is lowest."""
    lowest_l0: float
    floor: float | None
    """The lowest end of the intervals at every L0: above zero, a is ahead throughout."""
    highest: Interval
    highest_l0: float
    ahead: float
    """Share of the overlap, in log L0, where the seeds' mean is above zero."""


@dataclass(frozen=True)
class SeedFrontier:
    """One seed's values over log L0."""

    log_l0: Floats
    value: Floats

    def at(self, log_l0: Floats) -> Floats:
        return np.asarray(np.interp(log_l0, self.log_l0, self.value), dtype=np.float64)


Frontiers = Mapping[int, SeedFrontier]
"""By seed."""


def interval(values: Sequence[float]) -> Interval | None:
    """None of no values."""
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
    """Through a rising function."""
    low, high = (None if end is None else function(end) for end in (found.low, found.high))
    return Interval(function(found.mean), low, high, found.n)


def size(found: Interval) -> Interval:
    """Of a difference, whatever its sign. The interval's upper end is the farthest from zero."""
    if found.low is None or found.high is None:
        return Interval(abs(found.mean), None, None, found.n)
    nearest = 0.0 if found.low <= 0 <= found.high else min(abs(found.low), abs(found.high))
    return Interval(abs(found.mean), nearest, max(abs(found.low), abs(found.high)), found.n)


def frontiers(points: Sequence[ArmMeasurement], field: str) -> dict[int, SeedFrontier]:
    """A frontier for each seed that has a point. L0 = 0 has no place on a log axis; equal L0s are averaged."""
    known: dict[int, dict[float, list[float]]] = {}
    for point in points:
        value = getattr(point, field)
        if point.l0 and point.l0 > 0 and value is not None and math.isfinite(value) and math.isfinite(point.l0):
            known.setdefault(point.seed, {}).setdefault(math.log(point.l0), []).append(value)
    return {
        seed: SeedFrontier(np.array(sorted(at)), np.array([np.mean(at[x]) for x in sorted(at)]))
        for seed, at in sorted(known.items())
    }


def overlap(*arms: Frontiers) -> tuple[float, float] | None:
    """The range of log L0 that every frontier of every arm has. None where there is none."""
    all_of_them = [frontier for arm in arms for frontier in arm.values()]
    if not all(arms) or not all_of_them:
        return None
    low = max(float(frontier.log_l0[0]) for frontier in all_of_them)
    high = min(float(frontier.log_l0[-1]) for frontier in all_of_them)
    return (low, high) if low <= high else None


def paired(a: Frontiers, b: Frontiers) -> tuple[dict[int, SeedFrontier], dict[int, SeedFrontier]]:
    """Of both, the seeds that both have."""
    return {seed: a[seed] for seed in a if seed in b}, {seed: b[seed] for seed in b if seed in a}


def knots(span: tuple[float, float], *arms: Frontiers) -> Floats:
    """Every bend of a frontier inside the span, and its ends: between them all is straight."""
    low, high = span
    inside = {float(x) for arm in arms for frontier in arm.values() for x in frontier.log_l0 if low < x < high}
    return np.array(sorted({low, high} | inside))


def compare(a: Frontiers, b: Frontiers) -> MatchedArms | None:
    """Arm a minus arm b at matched L0, seed by seed. None where they have no seed or no L0 in common."""
    a, b = paired(a, b)
    span = overlap(a, b)
    if span is None:
        return None
    at = knots(span, a, b)
    differences = np.array([a[seed].at(at) - b[seed].at(at) for seed in a])
    each = [interval(column.tolist()) for column in differences.T]
    there = [found for found in each if found is not None]
    means = np.array([found.mean for found in there])
    worst, best = int(means.argmin()), int(means.argmax())
    overall = interval([average(row, at) for row in differences])
    assert overall is not None  # there is a seed
    return MatchedArms(
        l0_low=math.exp(span[0]),
        l0_high=math.exp(span[1]),
        mean=overall,
        lowest=there[worst],
        lowest_l0=math.exp(at[worst]),
        floor=min((found.low for found in there if found.low is not None), default=None),
        highest=there[best],
        highest_l0=math.exp(at[best]),
        ahead=share_above(means, at),
    )


def average(values: Floats, at: Floats) -> float:
    """Mean over log L0 of what is straight between the knots."""
    width = float(at[-1] - at[0])
    return float(np.trapezoid(values, at) / width) if width > 0 else float(values[0])


def share_above(values: Floats, at: Floats) -> float:
    """Share of the range where what is straight between the knots is above zero."""
    if len(at) == 1:
        return float(values[0] > 0)
    above = 0.0
    for (x0, y0), (x1, y1) in pairwise(zip(at.tolist(), values.tolist(), strict=True)):
        if y0 * y1 < 0:
            above += (x1 - x0) * max(y0, y1) / abs(y1 - y0)
        elif max(y0, y1) > 0:
            above += x1 - x0
    return above / float(at[-1] - at[0])


def nearest(target: float, span: tuple[float, float]) -> float:
    """log of the target L0, or of the nearest one in the span."""
    return min(max(math.log(target), span[0]), span[1])


def value_at(arm: Frontiers, log_l0: float) -> Interval | None:
    """Over the seeds that reach that L0."""
    at = np.array([log_l0])
    near = 1e-9
    there = [f for f in arm.values() if f.log_l0[0] - near <= log_l0 <= f.log_l0[-1] + near]
    return interval([float(frontier.at(at)[0]) for frontier in there])


def geometric_ratio(over: Frontiers, under: Frontiers, floor: float) -> tuple[Interval, str] | None:
    """Geometric mean over log L0 of over / under, seed by seed. Values below `floor` count as `floor`, so that a zero
    has a logarithm. What that makes of the ratio comes with it: ≥, a lower bound, where it raised values of `under`
    alone; ≤, an upper one, where of `over` alone; ≈ where of both; nothing where of none."""
    over, under = paired(over, under)
    span = overlap(over, under)
    if span is None:
        return None
    at = knots(span, over, under)
    logs, raised_over, raised_under = [], False, False
    for seed in over:
        top, bottom = over[seed].at(at), under[seed].at(at)
        raised_over |= bool((top < floor).any())
        raised_under |= bool((bottom < floor).any())
        logs.append(average(np.log(np.maximum(top, floor) / np.maximum(bottom, floor)), at))
    found = interval(logs)
    sign = ("≈" if raised_over else "≥") if raised_under else ("≤" if raised_over else "")
    return None if found is None else (mapped(found, math.exp), sign)


def against(points: Sequence[ArmMeasurement], reference: Frontiers, field: str) -> Interval | None:
    """Points minus the reference frontier of their own seed at their own L0: the mean of a seed, then over seeds.
    Points whose L0 the reference does not reach are left out."""
    by_seed: dict[int, list[float]] = {}
    for seed, frontier in frontiers(points, field).items():
        if seed not in reference:
            continue
        own = reference[seed]
        inside = (frontier.log_l0 >= own.log_l0[0]) & (frontier.log_l0 <= own.log_l0[-1])
        if inside.any():
            by_seed[seed] = (frontier.value - own.at(frontier.log_l0))[inside].tolist()
    return interval([float(np.mean(values)) for values in by_seed.values()])
