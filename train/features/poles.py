"""Keeps the counts of every pole: firings, sums, a histogram, the strongest contexts and a uniform sample of firings.

Everything here is associative to the last bit. Sums over a shard are added as whole numbers, because the sum of floats
depends on the order.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shared.errors import UserError
from train.features.code import PoleCode
from train.features.slots import CandidateFirings, Slots, lottery, strength

BINS: Final = 48
PER_OCTAVE: Final = 4
LOWEST: Final = -8
"""log2 of |f| / scale at the left end of the first bin. The outer bins also count what lies beyond them."""
FINE_BITS: Final = 40
"""Sums are whole numbers of 2^-40 of their unit, in two words."""
LARGEST: Final = 2.0**60
POLES_MERGED: Final = 8192
"""Poles of another table that are merged at a time."""


class ExactSum:
    """Sums of non-negative numbers per pole, exact to 2^-40 of `unit` whatever the order of additions."""

    def __init__(self, poles: int, unit: float) -> None:
        self.unit = unit
        self.whole, self.fine = np.zeros(poles, np.int64), np.zeros(poles, np.int64)

    def add(self, poles: slice, amounts: NDArray[np.float64]) -> None:
        """Adds one amount to each of some poles. Raises UserError for one beyond 2^60 units."""
        parts = amounts / self.unit
        if not (parts < LARGEST).all():
            raise UserError("a latent is more than 10^12 times as large as usual. Train this autoencoder again")
        whole = np.floor(parts)
        self.whole[poles] += whole.astype(np.int64)
        self.fine[poles] += np.rint((parts - whole) * 2.0**FINE_BITS).astype(np.int64)
        self.carry(poles)

    def carry(self, poles: slice) -> None:
        """Moves whole units from the lower word to the upper one, so that equal sums have equal words."""
        self.whole[poles] += self.fine[poles] >> FINE_BITS
        self.fine[poles] &= (1 << FINE_BITS) - 1

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        return {"whole": self.whole, "fine": self.fine}

    def merge(self, poles: slice, other: Mapping[str, NDArray[np.generic]]) -> None:
        self.whole[poles] += np.asarray(other["whole"][poles], np.int64)
        self.fine[poles] += np.asarray(other["fine"][poles], np.int64)
        self.carry(poles)

    def values(self) -> NDArray[np.float64]:
        return (self.whole + self.fine / 2.0**FINE_BITS) * self.unit


class PoleTable:
    """The counts of every pole of an autoencoder."""

    def __init__(self, poles: int, top: int, drawn: int, context: int, scale: float) -> None:
        self.poles, self.scale = poles, scale
        self.firings = np.zeros(poles, np.int64)
        self.hist = np.zeros((poles, BINS), np.uint32)
        self.mass, self.energy = ExactSum(poles, scale), ExactSum(poles, scale**2)
        self.best, self.drawn = Slots(poles, top, strength, context), Slots(poles, drawn, lottery)

    @property
    def parts(self) -> dict[str, ExactSum | Slots]:
        return {"mass": self.mass, "energy": self.energy, "best": self.best, "drawn": self.drawn}

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Everything that is counted, by name; the first axis is the poles."""
        parts = {f"{name}/{key}": value for name, part in self.parts.items() for key, value in part.arrays().items()}
        return {"firings": self.firings, "hist": self.hist, **parts}

    def take(self, code: PoleCode) -> None:
        """Counts the firings of one block of latents on one shard. Several threads may do so for different blocks."""
        first = code.code.first * code.sides
        many = int(code.pole.max(initial=first)) + 1 - first
        poles = slice(first, first + many)
        number = code.pole - first
        counts = np.bincount(number, minlength=many)
        self.firings[poles] += counts
        sizes = code.size.astype(np.float64)
        self.mass.add(poles, np.bincount(number, sizes, many).astype(np.float64))
        self.energy.add(poles, np.bincount(number, sizes**2, many).astype(np.float64))
        bins = bins_of(code.size, self.scale)
        cells = np.bincount(number * BINS + bins, minlength=many * BINS)
        self.hist[poles] += cells.reshape(many, BINS).astype(np.uint32)
        found = CandidateFirings(code.pole, code.value, code.place, code.windows)
        self.best.take(poles, found)
        self.drawn.take(poles, found)

    def merge(self, other: Mapping[str, NDArray[np.generic]]) -> None:
        """Adds the counts of other shards, given as the arrays of `arrays`."""
        for start in range(0, self.poles, POLES_MERGED):
            poles = slice(start, min(self.poles, start + POLES_MERGED))
            self.firings[poles] += np.asarray(other["firings"][poles], np.int64)
            self.hist[poles] += np.asarray(other["hist"][poles], np.uint32)
            for name, part in self.parts.items():
                part.merge(poles, {key: other[f"{name}/{key}"] for key in part.arrays()})


def bins_of(size: NDArray[np.float32], scale: float) -> NDArray[np.int64]:
    """Returns the histogram's bin of each magnitude."""
    octaves = np.log2(size) - np.float32(np.log2(scale) + LOWEST)
    bins: NDArray[np.int64] = np.clip(np.floor(octaves * PER_OCTAVE), 0, BINS - 1).astype(np.int64)
    return bins


def edges(scale: float) -> NDArray[np.float64]:
    """Returns the edges of the bins in the units of the activations, [BINS + 1]."""
    found: NDArray[np.float64] = scale * 2.0 ** (LOWEST + np.arange(BINS + 1) / PER_OCTAVE)
    return found


def quantiles(hist: NDArray[np.uint32], share: float, scale: float) -> NDArray[np.float64]:
    """Returns, for each pole, the magnitude below which `share` of its firings lie, read off its histogram: exact to
    the bin, a factor of 2^(1/4), and interpolated within it. NaN for a pole that never fires."""
    counts = hist.astype(np.float64)
    wanted = share * counts.sum(1)
    total = np.cumsum(counts, axis=1)
    bins = np.minimum((total < wanted[:, None]).sum(1), BINS - 1)
    rows = np.arange(len(hist))
    inside = counts[rows, bins]
    part = np.clip((wanted - (total[rows, bins] - inside)) / np.maximum(inside, 1), 0, 1)
    value = scale * 2.0 ** (LOWEST + (bins + part) / PER_OCTAVE)
    return np.where(counts.sum(1) > 0, value, np.nan)
