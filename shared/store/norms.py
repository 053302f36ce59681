"""Statistics of a hookpoint's rows beside their moments: norms, massive rows and outlying dimensions.

Norms were computed in float64 while harvesting, and each is read once. Quantiles are order statistics: exact for up to
`EXACT` rows, beyond that from counts in bins that are 1/4096 wide, so that memory does not grow with the store.

A row is *massive* when its norm exceeds `MASSIVE` times the median norm. In many language models a few tokens (the
first of a context, delimiters) are massive (arXiv 2402.17762), and hold most of the variance that R² is about.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shared.store.opened import Statistics, Store
from shared.store.reader import open_reader, read_places, read_shard
from shared.store.spec import rows_that_count

QUANTILES: Final = (0.0, 0.01, 0.5, 0.99, 1.0)
OUTLYING: Final = 6.0
"""A dimension is outlying when its root mean square is this many times that of the median dimension."""
MASSIVE: Final = 5.0
"""A row is massive when its norm is this many times the median norm. Norms of ordinary rows reach 4.4 times the median
(mlp_out of the shipped model). Of Gemma 3 270M's massive rows a tenth is between 5 and 10, and none between 3 and 5
(docs/records/experiments.md)."""
WORTH_SAYING: Final = 0.1
"""Share of the variance in massive rows from which on a message is printed."""
EXACT: Final = 1 << 22
LARGEST: Final = 512
"""Rows whose positions and tokens are collected."""
SAMPLED: Final = 32
"""Shards that `sample` reads."""


@dataclass(frozen=True)
class MassiveRows:
    """The rows whose norm exceeds `norm`, among those that count."""

    norm: float
    rows: int
    of: int
    """Rows that were examined."""
    variance: float
    """A lower bound on their share of E|x - mean|², from their norms and the norm of the mean."""
    positions: dict[int, int]
    """The most frequent positions in a context among the largest of them, with their counts."""
    tokens: dict[int, int]
    """The most frequent token ids among the largest of them, with their counts."""

    @property
    def text(self) -> str | None:
        """The message for a person; None where the massive rows hold little variance."""
        if self.variance < WORTH_SAYING:
            return None
        return (
            f"{share(self.rows / self.of)} of the tokens (norm above {MASSIVE:g} times the median) hold at least "
            f"{share(self.variance)} of the variance, and weigh as much in R². To leave them out: "
            f"sagsae train --max-norm {MASSIVE:g}"
        )


@dataclass(frozen=True)
class Norms:
    """Euclidean norms of the rows that count, and of position 0, which does not count by default."""

    n: int
    mean: float
    quantiles: dict[float, float]
    """The row of rank floor(q (n - 1)), in order of magnitude, by q."""
    at_position_0: float | None
    """Their mean over all contexts; None where none is finite."""
    nonfinite: int
    """Rows with a NaN or an infinity, whether they would count or not."""
    massive: MassiveRows

    @property
    def median(self) -> float:
        return self.quantiles[0.5]


@dataclass
class Distribution:
    """The distribution of non-negative numbers: all of them, or their counts in bins of float32's upper 20 bits, which
    order like the numbers."""

    n: int = 0
    total: float = 0.0
    smallest: float = np.inf
    largest: float = 0.0
    kept: list[NDArray[np.float32]] = field(default_factory=list)
    held: int = 0
    bins: NDArray[np.int64] | None = None

    def add(self, values: NDArray[np.float32]) -> None:
        if not len(values):
            return
        self.n += len(values)
        self.total += float(values.sum(dtype=np.float64))
        self.smallest, self.largest = min(self.smallest, float(values.min())), max(self.largest, float(values.max()))
        self.kept.append(values)
        self.held += len(values)
        if self.held > EXACT:
            bins = np.bincount(np.concatenate(self.kept).view(np.uint32) >> 12, minlength=1 << 19)
            self.bins = bins if self.bins is None else self.bins + bins
            self.kept, self.held = [], 0

    def counts(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Values in ascending order, and how often each occurs."""
        kept = np.concatenate([np.empty(0, np.float32), *self.kept])
        if self.bins is None:
            return np.sort(kept).astype(np.float64), np.ones(len(kept), np.int64)
        bins = self.bins + np.bincount(kept.view(np.uint32) >> 12, minlength=1 << 19)
        (there,) = np.nonzero(bins)
        middles = (there.astype(np.uint32) << 12 | 1 << 11).view(np.float32)
        return np.clip(middles.astype(np.float64), self.smallest, self.largest), bins[there]

    def quantiles(self) -> dict[float, float]:
        values, counts = self.counts()
        ends = np.cumsum(counts)
        found = {q: float(values[np.searchsorted(ends, int(q * (self.n - 1)), side="right")]) for q in QUANTILES}
        return {**found, 0.0: self.smallest, 1.0: self.largest}


@dataclass
class LargestNorms:
    """The largest norms so far, with their places."""

    norms: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    positions: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    tokens: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    def add(self, norms: NDArray[np.float32], positions: NDArray[Any], tokens: NDArray[Any]) -> None:
        if len(self.norms) == LARGEST:
            above = norms > self.norms.min()
            norms, positions, tokens = norms[above], positions[above], tokens[above]
        self.norms = np.concatenate([self.norms, norms])
        first = np.argsort(-self.norms, kind="stable")[:LARGEST]
        self.norms = self.norms[first]
        self.positions = np.concatenate([self.positions, positions.astype(np.int64)])[first]
        self.tokens = np.concatenate([self.tokens, tokens.astype(np.int64)])[first]


@dataclass(frozen=True)
class ShardNorms:
    """The rows of one shard, in stored order: norms, whether they count, positions, token ids."""

    norms: NDArray[np.float32]
    counts: NDArray[np.bool_]
    positions: NDArray[np.int64]
    tokens: NDArray[Any]


def sample(store: Store, hook: str) -> Norms | None:
    """Norms over some of the committed shards, evenly spread: enough to see massive rows, and quick."""
    return norms(spread(store), hook)


def spread(store: Store, count: int = SAMPLED) -> Store:
    """The same store with at most `count` of its committed shards, evenly spread."""
    shards = sorted(store.commits)
    if len(shards) > count:
        shards = [shards[i * len(shards) // count] for i in range(count)]
    return store.only(shards)


def norms(store: Store, hook: str) -> Norms | None:
    """Norms over the committed shards; None when no row counts."""
    found, largest = Distribution(), LargestNorms()
    first, n_first, nonfinite = 0.0, 0, 0
    for shard in shards(store, hook, store.commits):
        finite = np.isfinite(shard.norms)
        nonfinite += int((~finite).sum())
        at_first = shard.norms[(shard.positions == 0) & finite].astype(np.float64)
        first, n_first = first + float(at_first.sum()), n_first + len(at_first)
        counted = shard.counts & finite
        found.add(shard.norms[counted])
        largest.add(shard.norms[counted], shard.positions[counted], shard.tokens[counted])
    if not found.n:
        return None
    quantiles, at = found.quantiles(), first / n_first if n_first else None
    there = massive_rows(
        found, largest, MASSIVE * quantiles[0.5], store.statistics(hook) if store.kept(hook) > 1 else None
    )
    return Norms(found.n, found.total / found.n, quantiles, at, nonfinite, there)


def norms_by_position(store: Store, hook: str) -> NDArray[np.float64]:
    """The mean norm at each position of a context, [context], over all committed rows whose norm is finite; NaN at a
    position that has none."""
    total, count = np.zeros(store.spec.context), np.zeros(store.spec.context)
    for shard in shards(store, hook, store.commits):
        finite = np.isfinite(shard.norms)
        places = shard.positions[finite]
        total += np.bincount(places, shard.norms[finite].astype(np.float64), store.spec.context)
        count += np.bincount(places, minlength=store.spec.context)
    with np.errstate(invalid="ignore"):
        return total / count


def massive_rows(
    found: Distribution, largest: LargestNorms, limit: float, statistics: Statistics | None
) -> MassiveRows:
    """The massive rows. The bound on the variance uses |x - mean| >= |x| - |mean|."""
    values, counts = found.counts()
    above = values > limit
    variance = float(statistics.variance.sum()) if statistics else 0.0
    held = 0.0
    if statistics and variance > 0 and above.any():
        beyond = np.maximum(values[above] - np.linalg.norm(statistics.mean), 0.0)
        held = min(1.0, float((beyond**2 * counts[above]).sum()) / found.n / variance)
    seen = largest.norms > limit
    return MassiveRows(
        norm=limit,
        rows=int(counts[above].sum()),
        of=found.n,
        variance=held,
        positions=most_frequent(largest.positions[seen]),
        tokens=most_frequent(largest.tokens[seen]),
    )


def most_frequent(values: NDArray[np.int64]) -> dict[int, int]:
    return dict(Counter(values.tolist()).most_common(5))


def share(value: float) -> str:
    """`0.33 %`, and never a rounded 100 %."""
    percent = 100 * value
    return f"{percent:.3g} %" if percent < 99.95 else "over 99.9 %"


def shards(store: Store, hook: str, among: Iterable[int]) -> Iterator[ShardNorms]:
    """For each of these committed shards: the rows' norms, whether they count, their positions and tokens. Raises
    DamagedError where the index of a shard names rows of another."""
    tokens, spec = store.token_rows(check=False), store.spec
    contexts, positions = (open_reader(store, f"index/{name}") for name in ("context", "position"))
    norm = open_reader(store, f"stats/{hook}/norm")
    for shard in among:
        start, stop = spec.shard_range(shard)
        first = start // spec.context
        block = tokens[first : -(-stop // spec.context)]
        places = read_places(contexts, positions, shard) + (start - first * spec.context)
        counts = rows_that_count(block, spec).reshape(-1)[places]
        yield ShardNorms(read_shard(norm, shard), counts, places % spec.context, block.reshape(-1)[places])


def outlying(statistics: Statistics) -> dict[int, float]:
    """Dimensions whose root mean square is far above the median dimension's: number and ratio, largest first."""
    rms = np.sqrt(statistics.variance + statistics.mean**2)
    times = rms / max(float(np.median(rms)), np.finfo(np.float64).tiny)
    found = [int(dim) for dim in np.argsort(-times) if times[dim] > OUTLYING]
    return {dim: round(float(times[dim]), 2) for dim in found}
