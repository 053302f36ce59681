"""Compares two frontiers at the *same* L0. (The same λ gives different architectures a different L0.)

A frontier is one architecture at one width over its λ values (or k, or L0 targets). The seeds of each λ are averaged
(the value arithmetically; L0 geometrically, because its axis is logarithmic) and joined by straight lines in log L0.
Two frontiers are compared only in the range of L0 that both cover; nothing is extrapolated.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
from numpy.typing import NDArray

from train.report.sae import FrontierKey, MeasuredSAE, SparsityKnob


@dataclass(frozen=True)
class FrontierPoint:
    """The mean over the seeds of one λ, k or L0 target."""

    l0: float
    value: float


@dataclass(frozen=True)
class FrontierComparison:
    """Frontier a minus frontier b over the range of L0 that both cover. Means are over log L0."""

    l0_low: float
    l0_high: float
    lowest: float
    highest: float
    mean: float
    mean_a: float
    mean_b: float
    crossings: tuple[float, ...]


def mean_of_seeds(saes: Sequence[MeasuredSAE], field: str) -> list[FrontierPoint]:
    """Returns the frontier of autoencoders that differ only in knob and seed, sorted by L0. Those with L0 = 0 have no
    logarithm and are left out."""
    known = [sae for sae in saes if sae.l0 and sae.l0 > 0 and getattr(sae, field) is not None]
    points = []
    for _, group in groupby(sorted(known, key=lambda sae: sae.knob), key=lambda sae: sae.knob):
        seeds = list(group)
        log_l0 = sum(math.log(sae.l0) for sae in seeds if sae.l0) / len(seeds)
        points.append(FrontierPoint(math.exp(log_l0), sum(getattr(sae, field) for sae in seeds) / len(seeds)))
    return sorted(points, key=lambda point: point.l0)


def compare(a: Sequence[FrontierPoint], b: Sequence[FrontierPoint]) -> FrontierComparison | None:
    """Compares two frontiers; None when their ranges of L0 do not overlap. Both are straight between their points, so
    the extremes lie at points."""
    if not a or not b:
        return None
    low, high = max(a[0].l0, b[0].l0), min(a[-1].l0, b[-1].l0)
    if low > high:
        return None
    inside = {point.l0 for point in (*a, *b) if low < point.l0 < high}
    knots = np.log(sorted({low, high, *inside}))
    values_a, values_b = _interpolate(a, knots), _interpolate(b, knots)
    difference = values_a - values_b
    return FrontierComparison(
        l0_low=low,
        l0_high=high,
        lowest=float(difference.min()),
        highest=float(difference.max()),
        mean=_mean(difference, knots),
        mean_a=_mean(values_a, knots),
        mean_b=_mean(values_b, knots),
        crossings=_crossings(difference, knots),
    )


def seed_spread(saes: Sequence[MeasuredSAE]) -> float | None:
    """Returns the largest difference in R² between autoencoders that differ only in seed; None when no two do."""
    groups: dict[tuple[FrontierKey, SparsityKnob], list[float]] = {}
    for sae in saes:
        if sae.r2 is not None:
            groups.setdefault((sae.key, sae.knob), []).append(sae.r2)
    return max((max(r2) - min(r2) for r2 in groups.values() if len(r2) > 1), default=None)


def _interpolate(points: Sequence[FrontierPoint], log_l0: NDArray[np.float64]) -> NDArray[np.float64]:
    known, values = np.log([point.l0 for point in points]), np.array([point.value for point in points])
    return np.asarray(np.interp(log_l0, known, values), dtype=np.float64)


def _mean(values: NDArray[np.float64], knots: NDArray[np.float64]) -> float:
    width = knots[-1] - knots[0]
    return float(np.trapezoid(values, knots) / width) if width > 0 else float(values[0])


def _crossings(difference: NDArray[np.float64], knots: NDArray[np.float64]) -> tuple[float, ...]:
    """Returns the L0 at which the difference changes sign: between two points, or at the first point where it is
    exactly zero."""
    crossings = []
    for left, right in pairwise(np.flatnonzero(difference)):
        before, after = difference[left], difference[right]
        if before * after < 0:
            share = before / (before - after) if right == left + 1 else 1.0
            crossings.append(float(np.exp(knots[left] + share * (knots[left + 1] - knots[left]))))
    return tuple(crossings)
