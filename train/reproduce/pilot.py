"""The rule that tunes both methods: it chooses learning rate and initial threshold by R² at one L0.

The pilot trains one seed on few tokens. The L0 is the geometric mean over all pilot autoencoders of the cell, of both
methods: one number for both. A candidate's R² at this L0 is interpolated linearly in log L0 between its points.
Candidates whose points do not enclose the L0 rank after all others. Ties go to the smaller learning rate, then to the
smaller threshold.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from train.reproduce.curves import ArmMeasurement, frontiers, nearest


@dataclass(frozen=True)
class PilotChoice:
    """A candidate: a learning rate and an initial threshold."""

    lr: float
    theta0: float
    """The initial threshold, in units of 1/sqrt(d_in)."""


@dataclass(frozen=True)
class PilotTrial:
    """A candidate and the results by which it is ranked."""

    choice: PilotChoice
    r2: float | None
    """R² at the pilot's L0, or at the nearest L0 that the candidate reaches."""
    reaches: bool
    l0_low: float | None
    l0_high: float | None


@dataclass(frozen=True)
class Pilot:
    """The ranked candidates of each method."""

    l0: float
    trials: dict[str, list[PilotTrial]]
    """The candidates of each method, the best first."""

    def choice(self, arm: str) -> PilotChoice:
        return self.trials[arm][0].choice


Candidates = Mapping[str, Mapping[PilotChoice, Sequence[ArmMeasurement]]]
"""The measured points, by method and candidate."""


def choose(measured: Candidates) -> Pilot:
    """Ranks the candidates of every method by the rule above."""
    points = [point for arm in measured.values() for found in arm.values() for point in found]
    logs = [math.log(point.l0) for point in points if point.l0 and point.l0 > 0 and point.r2 is not None]
    target = math.exp(math.fsum(logs) / len(logs)) if logs else 1.0
    trials = {arm: [trial(choice, found, target) for choice, found in each.items()] for arm, each in measured.items()}
    return Pilot(target, {arm: sorted(found, key=rank) for arm, found in trials.items()})


def trial(choice: PilotChoice, points: Sequence[ArmMeasurement], target: float) -> PilotTrial:
    found = frontiers(points, "r2")
    if not found:
        return PilotTrial(choice, None, False, None, None)
    (frontier,) = found.values()  # of the one seed
    low, high = float(frontier.log_l0[0]), float(frontier.log_l0[-1])
    log_l0 = nearest(target, (low, high))
    r2 = float(frontier.at(frontier.log_l0[:1] * 0 + log_l0)[0])
    return PilotTrial(choice, r2, low <= math.log(target) <= high, math.exp(low), math.exp(high))


def rank(found: PilotTrial) -> tuple[bool, float, float, float]:
    worst = math.inf if found.r2 is None else -found.r2
    return not found.reaches, worst, found.choice.lr, found.choice.theta0
