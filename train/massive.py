"""Training and measuring without the rows of the largest norms (`max_norm`).

Which rows those are is decided by the norms of the store: so many times the median of the rows that count. The limit
is worked out when a run begins and goes into its config.json, so that what is measured later is what was trained on.
Mean and scale are then those of the rows that are left.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.config import TrainConfig
from shared.errors import UserError
from shared.norms import norms
from shared.progress import progress
from shared.reader import open_reader, read_shard
from shared.shard import as_float32
from shared.spec import rows_that_count
from shared.store import Statistics, Store
from train.order import Split
from train.rows import Kept, Rows


@dataclass(frozen=True)
class LeftOut:
    """The committed rows whose norm exceeds a limit."""

    limit: float
    places: Mapping[int, NDArray[np.int64]]
    """By shard, only of shards that have some: context x length of a context + position, in stored order."""

    @property
    def all(self) -> NDArray[np.int64]:
        return np.concatenate([np.empty(0, np.int64), *self.places.values()])

    def without(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The same mask [contexts, context] with these rows unmarked."""
        kept = mask.copy()
        kept.reshape(-1)[self.all] = False
        return kept


def norm_limit(store: Store, hook: str, config: TrainConfig) -> float | None:
    """The largest norm that is trained and measured on; None without `max_norm`. Reads all norms. Raises UserError for
    a store that still grows."""
    if config.max_norm is None:
        return None
    if config.follow:
        raise UserError(
            "max_norm: is a multiple of the median norm, which is not known before the harvest is complete. Leave out "
            "--follow, or max_norm"
        )
    found = norms(store, hook)
    if found is None:
        raise UserError(f"{store.name}: no row of {hook} counts. Harvest more tokens")
    return config.max_norm * found.median


def left_out(store: Store, hook: str, limit: float | None) -> LeftOut | None:
    """Reads all norms."""
    if limit is None:
        return None
    readers = [open_reader(store, array) for array in (f"stats/{hook}/norm", "index/context", "index/position")]
    places = {}
    for shard in store.commits:
        lengths = read_shard(readers[0], shard)
        above = (lengths > limit) & np.isfinite(lengths)
        if above.any():
            contexts, positions = (read_shard(reader, shard)[above] for reader in readers[1:])
            places[shard] = contexts.astype(np.int64) * store.spec.context + positions
    return LeftOut(limit, places)


def without(parts: Split, rows: LeftOut | None) -> Split:
    return parts if rows is None else Split(rows.without(parts.train), rows.without(parts.heldout))


def statistics(store: Store, hook: str, rows: LeftOut | None) -> Statistics:
    """Moments of the rows that count and are left. Shards with a row that is not are read as a whole and summed anew
    in float64: to subtract rows from sums that are nearly theirs would leave few digits."""
    if rows is None:
        return store.statistics(hook)
    mask = rows.without(rows_that_count(store.tokens(), store.spec))
    kept = Kept(Rows.of(store, hook), mask)
    d_in = store.spec.hookpoints[hook].d_in
    n, total, squares = 0, np.zeros(d_in), np.zeros(d_in)
    with progress("normalise without the rows left out", len(rows.places), "shards") as advance:
        for shard, commit in store.commits.items():
            if shard in rows.places:
                found = moments(kept, shard)
                advance(1, "")
            else:
                sums = [store.row_of_shard(f"stats/{hook}/{name}", shard) for name in ("sum", "sum_of_squares")]
                found = commit.kept - commit.nonfinite.get(hook, 0), *sums
            n, total, squares = n + found[0], total + found[1], squares + found[2]
    if n < 2:
        raise UserError(f"max_norm: only {n} rows of {store.name}/{hook} are left. Choose a larger one")
    mean = total / n
    return Statistics(n, mean, np.maximum(squares / n - mean**2, 0.0))


def moments(kept: Kept, shard: int) -> tuple[int, NDArray[np.float64], NDArray[np.float64]]:
    """How many rows of a shard are marked, their sum and sum of squares [d_in]."""
    n, total, squares = 0, np.zeros(1), np.zeros(1)
    chunk_rows = kept.rows.activations.layout.chunk_rows
    for chunk in range(-(-kept.rows.store.commits[shard].rows // chunk_rows)):
        values = kept.values(shard, chunk)
        rows = values if kept.rows.store.spec.quantised else as_float32(values, kept.rows.store.spec.dtype)
        x = rows.astype(np.float64)
        n, total, squares = n + len(x), total + x.sum(0), squares + np.square(x).sum(0)
    return n, total, squares
