"""Looks at the latents of SA-GSAE at H: whether both poles have a name, and whether values steer the language model.

Of each seed, the autoencoder whose L0 is nearest to that of the other comparisons is looked at.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from shared.errors import UserError
from shared.progress import say
from shared.schemas.features import FeaturesConfig
from shared.schemas.steer import DialConfig
from train.features.run import features
from train.reproduce.analysis import MATCHED_L0
from train.reproduce.curves import ArmMeasurement
from train.reproduce.preset import Request
from train.steer.dial import dial

NAMED: Final = 0.5
"""A pole has a lexical name when the F1 of its rule is above this."""
FIRINGS: Final = 50
"""Firings of each pole that a latent needs to be counted."""


def look(request: Request, run: Path, points: Sequence[ArmMeasurement]) -> list[ArmMeasurement]:
    """Returns the points of an arm, with `nameable` and `dial` of one of each seed."""
    chosen = {point.name for point in nearest_of_seeds(points)}
    return [looked_at(request, run, point) if point.name in chosen else point for point in points]


def nearest_of_seeds(points: Sequence[ArmMeasurement]) -> list[ArmMeasurement]:
    """Returns the point of each seed whose L0 is nearest to the matched one, on a logarithmic scale."""
    found: dict[int, tuple[float, ArmMeasurement]] = {}
    for point in points:
        if point.l0 is None or point.l0 <= 0:
            continue
        away = abs(math.log(point.l0 / MATCHED_L0))
        if point.seed not in found or away < found[point.seed][0]:
            found[point.seed] = away, point
    return [point for _, point in found.values()]


def looked_at(request: Request, run: Path, point: ArmMeasurement) -> ArmMeasurement:
    """Counts what the latents fire on, and tests some as a dial."""
    done = features(FeaturesConfig(run=run, sae=point.name, device=request.device))
    return replace(point, nameable=nameable(done.folder), dial=dials(request, run, point.name))


def nameable(folder: Path) -> float | None:
    """The share of latents that have a lexical name for both poles, among those whose poles both fire 50 times; None
    when there is no such latent. `folder`: RUN/features/NAME."""
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "latents.parquet", columns=["firings", "rule_f1"])
    firings, f1 = (table.column(name).to_numpy().reshape(-1, 2) for name in table.column_names)
    used = (firings >= FIRINGS).all(1)
    return float(np.mean((f1[used] > NAMED).all(1))) if used.any() else None


def dials(request: Request, run: Path, name: str) -> float | None:
    """The share of the tested latents that pass; None, with a message, where none can be tested."""
    preset = request.preset
    asked = DialConfig(
        run=run, sae=name, device=request.device, latents=preset.dial_latents, contexts=preset.dial_contexts
    )
    try:
        return dial(asked).found.share
    except UserError as error:
        say(f"{name}: its latents are not tested as a dial: {error}")
        return None
