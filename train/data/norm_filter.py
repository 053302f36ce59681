"""Rows with very large norms: left out of training and measuring (the setting `max_norm`), or shortened for training
(`longest_row`).

The limit of the norm is `max_norm` times the median norm of the store's rows that count. It is worked out when a run
begins and recorded in its config.json, so that evaluation leaves out the same rows as training. Mean and scale are
computed on the rows that remain.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from shared.config import TrainConfig
from shared.errors import DamagedError, UserError
from shared.progress import progress
from shared.store.norms import norms, shards
from shared.store.opened import Statistics, Store
from shared.store.reader import open_reader, read_places, read_shard
from shared.store.shard import as_float32
from train.data.order import Split
from train.data.row_mask import RowMask
from train.data.rows import HookRows

LARGEST_NORM: Final = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class FilteredRows:
    """The committed rows whose norm exceeds a limit."""

    limit: float
    places: Mapping[int, NDArray[np.int64]]
    """The rows' positions in the token stream (context * context length + position), in stored order, by shard. Only
    shards with such a row are in it."""

    @property
    def everywhere(self) -> NDArray[np.int64]:
        """The positions in the token stream of all left-out rows."""
        return np.concatenate([np.empty(0, np.int64), *self.places.values()])


def norm_limit(store: Store, hook: str, config: TrainConfig) -> float | None:
    """Returns the largest norm that is trained and measured on, or None without `max_norm`. Reads all norms. Raises
    UserError with `follow`, because the median is not known while a store grows."""
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
    limit = config.max_norm * found.median
    if limit > LARGEST_NORM:
        raise UserError(
            f"max_norm: {config.max_norm:g} times the median norm is beyond float32. Lower it, or leave it out"
        )
    return limit


def recorded_limit(identity: Mapping[str, Any], what: str) -> float | None:
    """Returns `norm_limit` from a run's config.json, or None. Raises DamagedError when it is not a positive number."""
    limit = identity.get("norm_limit")
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit <= LARGEST_NORM:
        raise DamagedError(f"{what}/config.json: norm_limit is not a positive number. Restore it from a copy")
    return float(limit)


def left_out(store: Store, hook: str, limit: float | None) -> FilteredRows | None:
    """Returns the committed rows whose norm exceeds `limit`, or None without a limit. Reads all norms."""
    if limit is None:
        return None
    norm = open_reader(store, f"stats/{hook}/norm")
    contexts, positions = (open_reader(store, f"index/{name}") for name in ("context", "position"))
    places = {}
    for shard in store.commits:
        lengths = read_shard(norm, shard)
        above = (lengths > limit) & np.isfinite(lengths)
        if above.any():
            start, _ = store.spec.shard_range(shard)
            places[shard] = start + read_places(contexts, positions, shard)[above]
    return FilteredRows(limit, places)


def without(parts: Split, rows: FilteredRows | None) -> Split:
    """Returns both masks of the split with these rows unmarked."""
    if rows is None:
        return parts
    train, heldout = (RowMask.of(mask).without(rows.everywhere) for mask in (parts.train, parts.heldout))
    return Split(train, heldout)


def statistics(store: Store, hook: str, rows: FilteredRows | None) -> Statistics:
    """Returns mean and variance [d_in] of the rows that count and are not left out. Shards with a left-out row are read
    and summed again in float64, because subtracting a few large rows from the stored sums would cancel most digits.
    Raises UserError when fewer than two rows remain."""
    if rows is None:
        return store.statistics(hook)
    d_in, source = store.spec.hookpoints[hook].d_in, HookRows.of(store, hook)
    n, total, squares = 0, np.zeros(d_in), np.zeros(d_in)
    with progress("normalise without the rows left out", len(rows.places), "shards") as advance:
        for number, shard in zip(rows.places, shards(store, hook, rows.places), strict=True):
            left = shard.counts & np.isfinite(shard.norms) & (shard.norms <= rows.limit)
            found = moments(source, number, left)
            n, total, squares = n + found[0], total + found[1], squares + found[2]
            advance(1, "")
    others = store.only([number for number in store.commits if number not in rows.places])
    if others.commits:
        n += others.kept(hook)
        total = total + others.total(f"stats/{hook}/sum")
        squares = squares + others.total(f"stats/{hook}/sum_of_squares")
    if n < 2:
        raise UserError(f"max_norm: only {n} rows of {store.name}/{hook} are left. Choose a larger one")
    mean = total / n
    return Statistics(n, mean, np.maximum(squares / n - mean**2, 0.0))


def shorten_(x: Float[Tensor, "batch d_in"], mean: Float[Tensor, " d_in"], longest: float) -> None:
    """Moves rows that are farther than `longest` from `mean` towards it, to that distance. Other rows keep every bit.
    Never waits for the device."""
    away = x - mean
    distance = torch.linalg.vector_norm(away, dim=1, keepdim=True)
    torch.where(distance > longest, away.mul_(longest / distance).add_(mean), x, out=x)


def moments(
    rows: HookRows, shard: int, left: NDArray[np.bool_]
) -> tuple[int, NDArray[np.float64], NDArray[np.float64]]:
    """Returns how many of a shard's rows are marked in `left`, their sum [d_in] and their sum of squares [d_in]."""
    spec, chunk_rows = rows.store.spec, rows.activations.layout.chunk_rows
    d_in = rows.activations.layout.row_shape[0]
    total, squares = np.zeros(d_in), np.zeros(d_in)
    for chunk, start in enumerate(range(0, len(left), chunk_rows)):
        values = rows.values(shard, chunk)[left[start : start + chunk_rows]]
        x = (values if spec.quantised else as_float32(values, spec.dtype)).astype(np.float64)
        total, squares = total + x.sum(0), squares + np.square(x).sum(0)
    return int(left.sum()), total, squares
