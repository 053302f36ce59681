"""What the rows of a hookpoint look like beside their moments: norms and outlying dimensions, exact.

Norms were taken in float64 while harvesting. Quantiles are order statistics, found by counting the bit patterns of
float32 in two passes over the shards, so that memory does not grow with the store.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shared.reader import open_reader, read_places, read_shard
from shared.spec import rows_that_count
from shared.store import Statistics, Store

QUANTILES: Final = (0.0, 0.01, 0.5, 0.99, 1.0)
OUTLYING: Final = 6.0
"""A dimension is outlying when its root mean square is so many times that of the median dimension."""


@dataclass(frozen=True)
class Norms:
    """Euclidean norms of the rows that count, and of position 0, which does not count by default."""

    n: int
    mean: float
    quantiles: dict[float, float]
    """The row of rank floor(q (n - 1)), in order of size."""
    at_position_0: float | None
    """Their mean over all contexts; None where none is finite."""
    nonfinite: int
    """Rows with a NaN or an infinity, whether they would count or not."""


def norms(store: Store, hook: str) -> Norms | None:
    """Over the committed shards; None when no row counts."""
    high = np.zeros(1 << 16, np.int64)
    total, first, n_first, nonfinite = 0.0, 0.0, 0, 0
    for values, counts, positions in shards(store, hook):
        finite = np.isfinite(values)
        nonfinite += int((~finite).sum())
        at_first = values[(positions == 0) & finite].astype(np.float64)
        first, n_first = first + float(at_first.sum()), n_first + len(at_first)
        counted = values[counts & finite]
        total += float(counted.sum(dtype=np.float64))
        high += np.bincount(counted.view(np.uint32) >> 16, minlength=1 << 16)
    n = int(high.sum())
    if not n:
        return None
    ranks = {q: int(q * (n - 1)) for q in QUANTILES}
    at = first / n_first if n_first else None
    return Norms(n, total / n, by_rank(store, hook, high, ranks), at, nonfinite)


def by_rank(store: Store, hook: str, high: NDArray[np.int64], ranks: dict[float, int]) -> dict[float, float]:
    """The values of these ranks. `high` counts values by the upper half of their bits, which order like they do."""
    ends = np.cumsum(high)
    halves = {q: int(np.searchsorted(ends, rank, side="right")) for q, rank in ranks.items()}
    low = {half: np.zeros(1 << 16, np.int64) for half in halves.values()}
    for values, counts, _ in shards(store, hook):
        bits = values[counts & np.isfinite(values)].view(np.uint32)
        for half, found in low.items():
            found += np.bincount(bits[bits >> 16 == half] & 0xFFFF, minlength=1 << 16)
    values_of = {}
    for q, half in halves.items():
        before = int(ends[half - 1]) if half else 0
        rest = int(np.searchsorted(np.cumsum(low[half]), ranks[q] - before, side="right"))
        values_of[q] = float(np.uint32(half << 16 | rest).view(np.float32))
    return values_of


def shards(store: Store, hook: str) -> Iterator[tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.int64]]]:
    """Of each committed shard the rows' norms, whether they count, and their positions."""
    keep = rows_that_count(store.tokens(), store.spec)
    arrays = (f"stats/{hook}/norm", "index/context", "index/position")
    norm, of_contexts, of_positions = (open_reader(store, array) for array in arrays)
    for shard in store.commits:
        contexts, positions = read_places(of_contexts, of_positions, shard)
        yield read_shard(norm, shard), keep[contexts, positions], positions


def outlying(statistics: Statistics) -> dict[int, float]:
    """Dimensions whose root mean square is far above the median dimension's, by number: how many times; largest
    first."""
    rms = np.sqrt(statistics.variance + statistics.mean**2)
    times = rms / max(float(np.median(rms)), np.finfo(np.float64).tiny)
    found = [int(dim) for dim in np.argsort(-times) if times[dim] > OUTLYING]
    return {dim: round(float(times[dim]), 2) for dim in found}
