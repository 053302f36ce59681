"""Decides which autoencoder of a run is meant, and names the best one where the user has to choose."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shared.errors import UserError
from shared.saes import SAEConfig
from train.report.data import read_run
from train.report.frontier import mean_of_seeds
from train.report.sae import FrontierKey, MeasuredSAE


def choose(run: Path, good: Sequence[SAEConfig], asked: str | None) -> tuple[SAEConfig, MeasuredSAE]:
    """Returns the autoencoder `asked` for, or the only one, and what was measured of it. `good`: those that did not
    diverge. Raises UserError, which lists them all with their L0 and R², where it is not clear, and where the run was
    not evaluated."""
    measured = {sae.name: sae for sae in read_run(run).saes}
    configs = {config.name: config for config in good}
    if asked is not None and asked not in configs:
        raise UserError(f"--sae {asked}: {run} has no such autoencoder. It has\n{listed(list(measured.values()))}")
    if asked is None and len(configs) > 1:
        saes = [sae for name, sae in measured.items() if name in configs]
        raise UserError(f"{run}: holds {len(configs)} autoencoders. {advice(saes)}\n{listed(saes)}")
    name = asked or next(iter(configs), None)
    if name is None:
        raise UserError(f"{run}: every autoencoder has diverged. Train again with a lower learning rate (--lr)")
    if name not in measured:
        raise UserError(f"{run}: {name} was not measured. Run: sagsae eval {run}")
    return configs[name], measured[name]


def listed(saes: Sequence[MeasuredSAE]) -> str:
    """One line for each, by name."""
    return "\n".join(f"  {sae.name}  L0 {number(sae.l0, 4)}  R² {number(sae.r2, 4)}" for sae in saes)


def number(value: float | None, digits: int) -> str:
    return "not measured" if value is None else f"{value:.{digits}g}"


def advice(saes: Sequence[MeasuredSAE]) -> str:
    best, middle = best_at_median(saes)
    if best is None:
        return "Choose one with --sae:"
    return f"Choose one with --sae. At the median L0 of {middle:.3g} the best is {best.name}:"


def best_at_median(saes: Sequence[MeasuredSAE]) -> tuple[MeasuredSAE | None, float]:
    """Returns the autoencoder nearest to the median L0 on the frontier that has the largest R² there, and the median.
    Frontiers are joined as in a report (train/report/frontier.py); where none covers the median, the nearest
    autoencoder is returned. (None, 0) where nothing was measured."""
    known = [sae for sae in saes if sae.l0 and sae.l0 > 0 and sae.r2 is not None]
    if not known:
        return None, 0.0
    middle = math.exp(float(np.median([math.log(sae.l0 or 1) for sae in known])))
    series: dict[FrontierKey, list[MeasuredSAE]] = {}
    for sae in known:
        series.setdefault(sae.key, []).append(sae)
    heights = {key: height for key, some in series.items() if (height := r2_at(some, middle)) is not None}
    among = series[max(heights, key=lambda key: heights[key])] if heights else known
    return min(among, key=lambda sae: (abs(math.log((sae.l0 or 1) / middle)), -(sae.r2 or 0))), middle


def best_of(run: Path, arch: str) -> str:
    """Returns the name of the best autoencoder of an architecture at its median L0."""
    saes = [sae for sae in read_run(run).saes if sae.arch == arch]
    best, _ = best_at_median(saes)
    return (best or saes[0]).name


def r2_at(saes: Sequence[MeasuredSAE], l0: float) -> float | None:
    """The frontier's R² at an L0; None where it does not reach so far."""
    points = mean_of_seeds(saes, "r2")
    if not points[0].l0 <= l0 <= points[-1].l0:
        return None
    return float(np.interp(math.log(l0), [math.log(point.l0) for point in points], [point.value for point in points]))
