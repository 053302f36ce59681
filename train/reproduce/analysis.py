"""Computes, from the measurements of one cell, the numbers that the claims are about. Pure functions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from train.reproduce.curves import (
    ArmMeasurement,
    Interval,
    MatchedArms,
    against,
    compare,
    frontiers,
    geometric_ratio,
    interval,
    nearest,
    overlap,
    value_at,
)
from train.reproduce.plan import GATED_FULL, GATED_HALF, SA_FULL, SA_HALF, TIE_R, UNTIED

Arms = Mapping[str, Sequence[ArmMeasurement]]

MATCHED_L0: Final = 64.0
"""The L0 at which dead latents are compared; if not both arms reach it, the nearest L0 that both have."""
TOLERANCE: Final = 0.025
"""The difference in R² up to which the paper says that two methods match."""
NO_OVERLAP: Final = "no overlap"


@dataclass(frozen=True)
class DeadComparison:
    """Shares of dead latents of both arms at one L0."""

    l0: float
    sa: Interval
    gated: Interval
    difference: Interval
    """SA-GSAE minus Gated, seed by seed."""


@dataclass(frozen=True)
class DeadRatio:
    """The dead latents of Gated divided by those of SA-GSAE, as a geometric mean over the overlap."""

    ratio: Interval
    bound: str
    """≥, ≤, ≈ or empty: how `ratio` bounds the true one. Where fewer than half a latent is dead, half a latent is
    counted (`geometric_ratio`)."""


@dataclass(frozen=True)
class ChangeEffect:
    """The results of an ablation or a baseline."""

    width: int
    l0: Interval | None
    r2: Interval | None
    dead: Interval | None
    loss_recovered: Interval | None
    difference: Interval | None
    """R² minus that of SA-GSAE at H at matched L0; None when its L0 is outside that frontier."""
    more_dead: Interval | None
    """Share of dead latents minus that of SA-GSAE at H with the same λ."""


@dataclass(frozen=True)
class CellResult:
    """All numbers of one cell."""

    cell: str
    hook: str
    r2: MatchedArms | None
    """SA-GSAE at H minus Gated at 2H."""
    verdict: str
    certain: bool
    """Whether the verdict holds for the whole interval at every L0, not only for the mean."""
    dead: DeadComparison | None
    dead_ratio: DeadRatio | None
    bipolar: Interval | None
    """Share of the live latents of SA-GSAE at H that use both poles, at `dead.l0`."""
    bipolar_energy: Interval | None
    """Share of them with more than a tenth of their energy Σf² on the weaker side."""
    concentration: Interval | None
    """`bipolar` among the tenth of latents that fires most, minus `bipolar`."""
    nameable: Interval | None
    """Share of the latents of SA-GSAE at H that have a lexical name for both poles."""
    dial: Interval | None
    """Share of its tested latents that are a dial."""
    equal_width: MatchedArms | None
    """SA-GSAE at H minus Gated at H."""
    full_width: MatchedArms | None
    """SA-GSAE at 2H minus SA-GSAE at H."""
    tied_r: Interval | None
    """R² with r tied minus R² untied, each relative to SA-GSAE at H at matched L0."""
    tied: Interval | None
    """R² of SA-GSAE with everything tied minus R² untied."""
    changed: dict[str, ChangeEffect]


def analyse(cell: str, hook: str, main: Arms, ablations: Arms) -> CellResult:
    """Computes all numbers of a cell."""
    sa, gated = main.get(SA_HALF, ()), main.get(GATED_FULL, ())
    r2_of = {arm: frontiers(points, "r2") for arm, points in main.items()}
    half = r2_of.get(SA_HALF, {})
    r2 = compare(half, r2_of.get(GATED_FULL, {}))
    dead = dead_at(sa, gated)
    untied = against(ablations.get(UNTIED, ()), half, "r2")
    return CellResult(
        cell=cell,
        hook=hook,
        r2=r2,
        verdict=verdict(r2),
        certain=certain(r2),
        dead=dead,
        dead_ratio=dead_ratio(sa, gated),
        bipolar=value_at(frontiers(sa, "bipolar"), math.log(dead.l0)) if dead else None,
        bipolar_energy=value_at(frontiers(sa, "bipolar_energy"), math.log(dead.l0)) if dead else None,
        concentration=value_at(frontiers(sa, "concentration"), math.log(dead.l0)) if dead else None,
        nameable=interval([point.nameable for point in sa if point.nameable is not None]),
        dial=interval([point.dial for point in sa if point.dial is not None]),
        equal_width=compare(half, r2_of.get(GATED_HALF, {})),
        full_width=compare(r2_of.get(SA_FULL, {}), half),
        tied_r=difference(ablations.get(TIE_R, ()), ablations.get(UNTIED, ()), sa),
        tied=None if untied is None else negated(untied),
        changed={arm: changed(points, sa) for arm, points in ablations.items()},
    )


def verdict(r2: MatchedArms | None, tolerance: float = TOLERANCE) -> str:
    """Returns the verdict by the lowest mean over seeds in the overlap: "dominates" above zero, "within 0.025" down to
    minus the tolerance, "worse" below."""
    if r2 is None:
        return NO_OVERLAP
    if r2.lowest.mean > 0:
        return "dominates"
    return f"within {tolerance:g}" if r2.lowest.mean >= -tolerance else "worse"


def certain(r2: MatchedArms | None, tolerance: float = TOLERANCE) -> bool:
    """Whether the verdict is the same at both ends of the intervals. With one seed it never is certain."""
    if r2 is None or r2.floor is None or r2.lowest.high is None:
        return False
    found = verdict(r2, tolerance)
    if found == "dominates":
        return r2.floor > 0
    if found == "worse":
        return r2.lowest.high < -tolerance
    return r2.floor >= -tolerance and r2.lowest.high <= 0


def dead_at(
    sa: Sequence[ArmMeasurement], gated: Sequence[ArmMeasurement], target: float = MATCHED_L0
) -> DeadComparison | None:
    """Compares dead latents at the target L0, or at the nearest L0 that every seed of both arms has. Returns None
    without such an L0."""
    a, b = frontiers(sa, "dead"), frontiers(gated, "dead")
    span = overlap(a, b)
    if span is None:
        return None
    log_l0 = nearest(target, span)
    found, other = value_at(a, log_l0), value_at(b, log_l0)
    gap = interval([float(a[seed].at(np.array(log_l0)) - b[seed].at(np.array(log_l0))) for seed in a if seed in b])
    return DeadComparison(math.exp(log_l0), found, other, gap) if found and other and gap else None


def dead_ratio(sa: Sequence[ArmMeasurement], gated: Sequence[ArmMeasurement]) -> DeadRatio | None:
    """Returns dead(Gated) / dead(SA-GSAE). Fewer dead latents than half a latent of the narrower dictionary count as
    half a latent, in both."""
    widths = [point.d_sae for point in (*sa, *gated)]
    if not widths:
        return None
    found = geometric_ratio(frontiers(gated, "dead"), frontiers(sa, "dead"), 0.5 / min(widths))
    return DeadRatio(*found) if found else None


def changed(points: Sequence[ArmMeasurement], sa: Sequence[ArmMeasurement]) -> ChangeEffect:
    """Summarises an ablation or baseline: means within each seed, then over seeds."""
    same = {(point.seed, point.setting): point.dead for point in sa}
    more = [
        point.dead - before
        for point in points
        if point.dead is not None and (before := same.get((point.seed, point.setting))) is not None
    ]
    return ChangeEffect(
        width=max((point.d_sae for point in points), default=0),
        l0=over_seeds(points, "l0"),
        r2=over_seeds(points, "r2"),
        dead=over_seeds(points, "dead"),
        loss_recovered=over_seeds(points, "loss_recovered"),
        difference=against(points, frontiers(sa, "r2"), "r2"),
        more_dead=interval(more),
    )


def over_seeds(points: Sequence[ArmMeasurement], field: str) -> Interval | None:
    by_seed: dict[int, list[float]] = {}
    for point in points:
        value = getattr(point, field)
        if value is not None and math.isfinite(value):
            by_seed.setdefault(point.seed, []).append(value)
    return interval([math.fsum(values) / len(values) for values in by_seed.values()])


def difference(
    a: Sequence[ArmMeasurement], b: Sequence[ArmMeasurement], sa: Sequence[ArmMeasurement]
) -> Interval | None:
    """Returns R² of a minus R² of b, each relative to the frontier of SA-GSAE at H, seed by seed."""
    reference = frontiers(sa, "r2")
    gaps = []
    for seed in reference:
        x, y = (against([p for p in arm if p.seed == seed], reference, "r2") for arm in (a, b))
        if x and y:
            gaps.append(x.mean - y.mean)
    return interval(gaps)


def negated(found: Interval) -> Interval:
    low, high = (None if end is None else -end for end in (found.high, found.low))
    return Interval(-found.mean, low, high, found.n)
