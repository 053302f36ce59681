"""Activations whose true features are known: the rows of a synthetic store, as a pure function of its parameters.

    x = (Σ_i c_i a_i + σ ε) / s        a_i random unit vectors, ε ~ N(0, 1) per dimension

Feature i of m is active with probability p_i ∝ i^-zipf, Σ p_i = l0, independently of the others. Then c_i is uniform
between two positive numbers; if i is one of the round(p_bipolar · m) bipolar features, it is negative in half of all
cases. s makes E|x - mean|² = 1 (docs/explanation/synthetic.md).

Rows come in blocks of 256, each from its own random words (Philox, keyed by seed and block): any row can be made
without the ones before it. Every number is a function of raw words and of operations in a fixed order, so shards,
threads and the shape of a request do not change a bit of it.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Annotated, Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from shared.permute import SYNTHETIC, permutation, philox
from shared.schema import Frozen, build

BLOCK: Final = 256
"""Rows that come from one stream of random words."""
DIRECTIONS, BIPOLAR, CODES, NOISE = range(4)
"""Purposes of random words, as part of their key."""
NAME: Final = "synthetic"
"""Name of the model in a synthetic store's spec; its parameters are under the same key."""

SMALLEST_VARIANCE: Final = 1e-18
"""Smallest variance of rows before scaling: far from where squares of float64 vanish."""
MAX_NUMBERS: Final = 1 << 28
"""Largest number of values of all directions together: 2 GiB."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
Size = Annotated[Finite, Field(le=1e6)]
"""A magnitude. Rows are scaled to unit variance, so only ratios of magnitudes matter."""


class Synthetic(Frozen):
    """The parameters: everything that decides the rows. In a store's spec they are `model.synthetic`."""

    d_in: Annotated[int, Field(ge=1, le=1 << 16)] = 64
    """Width of a row."""
    features: Annotated[int, Field(ge=1, le=1 << 20)] = 96
    """Number of true features, m."""
    p_bipolar: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the features that are active with either sign."""
    l0: Annotated[Finite, Field(gt=0)] = 3.0
    """Active features per row, on average."""
    zipf: Annotated[Finite, Field(ge=0, le=100)] = 0.5
    """The i-th feature is active in proportion to i^-zipf."""
    coefficients: tuple[Size, Size] = (0.5, 1.5)
    """Range of an active feature's magnitude, uniform, before the rows are scaled."""
    noise: Annotated[Size, Field(ge=0)] = 0.01
    """Standard deviation of the noise in each dimension, before the rows are scaled."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of features, rows and the order of rows."""

    @model_validator(mode="after")
    def check_generator(self) -> "Synthetic":
        low, high = self.coefficients
        if not 0 <= low <= high or high == 0:
            raise ValueError(f"coefficients: expected two sizes 0 <= low <= high, high above 0 (got {low:g}, {high:g})")
        if self.features * self.d_in > MAX_NUMBERS:
            raise ValueError(
                f"features: {self.features:,} directions of {self.d_in:,} numbers do not fit into memory. Lower one of "
                f"the two: their product can be at most {MAX_NUMBERS:,}"
            )
        most = 1 / float(shares(self.features, self.zipf)[0])
        if self.l0 > most:
            raise ValueError(
                f"l0: {self.l0:g} would have the first feature active more than once per row; with {self.features} "
                f"features and zipf {self.zipf:g} it can be at most {int(most * 100) / 100:g}"
            )
        truth = TrueFeatures(self)
        if not truth.limits.any():
            raise ValueError(f"l0: {self.l0:g} is so small that no feature would ever be active. Raise l0")
        if not truth.scale**2 > SMALLEST_VARIANCE:
            raise ValueError("noise: every row would be the same. Raise noise, or lower l0")
        return self


def shares(features: int, zipf: float) -> NDArray[np.float64]:
    """Each feature's share of all activity, [features]."""
    weights = np.arange(1, features + 1, dtype=np.float64) ** -zipf
    found: NDArray[np.float64] = weights / weights.sum()
    return found


@dataclass(frozen=True)
class SyntheticCodes:
    """The active features of some rows, sorted by row."""

    rows: NDArray[np.int64]
    """[active] index of the row in the request."""
    features: NDArray[np.int64]
    """[active] number of the feature."""
    values: NDArray[np.float64]
    """[active] c_i / s, signed, in units of the stored rows."""


@dataclass(frozen=True)
class TrueFeatures:
    """The true features of a synthetic store, and the rows that they make."""

    parameters: Synthetic

    @cached_property
    def probabilities(self) -> NDArray[np.float64]:
        """[features] probability that each is active."""
        return self.parameters.l0 * shares(self.parameters.features, self.parameters.zipf)

    @cached_property
    def bipolar(self) -> NDArray[np.bool_]:
        """[features] which are active with either sign."""
        m = self.parameters.features
        chosen = np.zeros(m, dtype=bool)
        chosen[permutation(m, self.parameters.seed, SYNTHETIC, BIPOLAR)[: round(self.parameters.p_bipolar * m)]] = True
        return chosen

    @cached_property
    def directions(self) -> NDArray[np.float64]:
        """[features, d_in] unit vectors."""
        d_in = self.parameters.d_in
        found = normals(self.words(self.parameters.features, (d_in + 1) // 2, DIRECTIONS))[:, :d_in]
        unit: NDArray[np.float64] = found / np.sqrt(np.square(found).sum(axis=1, keepdims=True))
        return unit

    @cached_property
    def signal_variance(self) -> float:
        """Σ_i var(c_i): E|x - mean|² before noise and scaling. Unit vectors, independent coefficients."""
        low, high = self.parameters.coefficients
        p, square, mean = self.probabilities, (low**2 + low * high + high**2) / 3, (low + high) / 2
        return float(np.sum(p * square - np.where(self.bipolar, 0, p * mean) ** 2))

    @cached_property
    def scale(self) -> float:
        """The scale s of the module's formula."""
        return float(np.sqrt(self.signal_variance + self.parameters.d_in * self.parameters.noise**2))

    def words(self, rows: int, columns: int, *purpose: int) -> NDArray[np.uint64]:
        """Random 64-bit words [rows, columns]."""
        raw = philox(self.parameters.seed, SYNTHETIC, *purpose).random_raw(rows * columns)
        return raw.reshape(rows, columns)

    def block_codes(self, block: int) -> SyntheticCodes:
        """The active features of one block's rows. A word's upper half decides whether a feature is active, one bit its
        sign, the rest its magnitude."""
        words = self.words(BLOCK, self.parameters.features, CODES, block)
        rows, features = np.nonzero((words >> np.uint64(32)) < self.limits)
        word, (low, high) = words[rows, features], self.parameters.coefficients
        sizes = low + (high - low) * ((word & np.uint64(0x7FFFFFFF)).astype(np.float64) + 0.5) / 2**31
        negative = self.bipolar[features] & ((word & np.uint64(0x80000000)) != 0)
        return SyntheticCodes(rows, features, np.where(negative, -sizes, sizes) / self.scale)

    @cached_property
    def limits(self) -> NDArray[np.uint64]:
        """[features] how many of 2**32 numbers mean that a feature is active."""
        return np.rint(self.probabilities * 2**32).astype(np.uint64)

    def block_rows(self, block: int) -> NDArray[np.float64]:
        """[BLOCK, d_in] rows, in the order of the token stream."""
        d_in, noise = self.parameters.d_in, self.parameters.noise
        if noise:
            x = normals(self.words(BLOCK, (d_in + 1) // 2, NOISE, block))[:, :d_in] * (noise / self.scale)
        else:
            x = np.zeros((BLOCK, d_in))
        codes = self.block_codes(block)
        counts = np.bincount(codes.rows, minlength=BLOCK)
        first = np.cumsum(counts) - counts
        for nth in range(counts.max(initial=0)):  # the nth active feature of every row that has more than nth
            rows = np.flatnonzero(counts > nth)
            at = first[rows] + nth
            x[rows] += codes.values[at, None] * self.directions[codes.features[at]]
        return x

    def codes(self, positions: NDArray[np.int64]) -> SyntheticCodes:
        """The active features of the rows at these distinct positions of the token stream."""
        parts = [SyntheticCodes(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
        blocks, inside = np.divmod(positions, BLOCK)
        order = np.argsort(blocks, kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(blocks[order])) + 1) if len(order) else []:
            codes = self.block_codes(int(blocks[group[0]]))
            asked = np.full(BLOCK, -1)
            asked[inside[group]] = group
            rows = asked[codes.rows]
            parts.append(SyntheticCodes(rows[rows >= 0], codes.features[rows >= 0], codes.values[rows >= 0]))
        rows = np.concatenate([part.rows for part in parts])
        order = np.argsort(rows, kind="stable")
        features = np.concatenate([part.features for part in parts])
        values = np.concatenate([part.values for part in parts])
        return SyntheticCodes(rows[order], features[order], values[order])

    @cached_property
    def directed(self) -> NDArray[np.float64]:
        """[directed, d_in] unit vectors: +a_i of every feature, then -a_i of every bipolar one."""
        return np.concatenate([self.directions, -self.directions[self.bipolar]])

    def directed_numbers(self, codes: SyntheticCodes) -> NDArray[np.int64]:
        """[active] the number of the directed feature of each active one."""
        negative = len(self.bipolar) + np.cumsum(self.bipolar) - 1
        return np.where(codes.values < 0, negative[codes.features], codes.features)


def normals(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Standard normal numbers, two from each word: [n, k] -> [n, 2 k] (Box and Muller)."""
    radius = np.sqrt(-2 * np.log(((words >> np.uint64(32)).astype(np.float64) + 1) / 2**32))
    angle = (words & np.uint64(0xFFFFFFFF)).astype(np.float64) * (2 * np.pi / 2**32)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


@lru_cache(maxsize=4)
def truth_with(parameters: Synthetic) -> TrueFeatures:
    return TrueFeatures(parameters)


def truth_of(model: dict[str, Any]) -> TrueFeatures | None:
    """The true features of the store whose spec has this `model`; None where a language model was harvested."""
    parameters = model.get(NAME)
    return None if parameters is None else truth_with(build(Synthetic, parameters))
