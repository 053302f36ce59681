"""Who reads what, when: pure functions of (snapshot, seed, epoch, position), in numpy, without ranks.

A unit of reading is a run: a few consecutive chunks of one shard. An epoch is a permutation of the runs, dealt to V
virtual streams. A stream reads its runs in windows and gives out the rows of a window in random order; a global batch
takes the same number of rows from every stream, so it does not depend on how many processes share it. Position is all
the state there is. Streams differ by a run or so in length: when an epoch's worth of rows is given out, some have begun
the next one and others have a rest to go (about 1 % of the rows of a store of 150 runs, less in larger ones). Who has
the longer part changes from epoch to epoch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shared.config import TrainConfig
from shared.permute import EPOCH_CHUNKS, HELDOUT, WINDOW_ROWS, permutation
from shared.spec import StoreSpec

BLOCK_BYTES: Final = 16_384
UNITS_PER_STREAM: Final = 16
"""At least so many units to a stream."""


@dataclass(frozen=True)
class Run:
    """Consecutive chunks of one shard that are read together: one range request on an object store."""

    shard: int
    first: int
    """Number of the first chunk in the shard."""
    count: int
    """Chunks."""


def runs(rows_per_shard: Mapping[int, int], chunk_rows: int, run_chunks: int) -> list[Run]:
    """Every chunk that exists, once, in runs of `run_chunks` that do not cross shards; a shard's last may be shorter,
    and its last chunk partly filled. By shard, whatever the order of the mapping: a run's place is its unit number."""
    return [
        Run(shard, first, min(run_chunks, n_chunks - first))
        for shard, n_chunks in sorted((shard, -(-rows // chunk_rows)) for shard, rows in rows_per_shard.items())
        for first in range(0, n_chunks, run_chunks)
    ]


def share(batch: int, streams: int, rank: int, ranks: int) -> list[tuple[int, int, int]]:
    """The part of every global batch that a rank gives out: (stream, lo, hi), rows lo to hi of the stream's piece.

    A global batch is the streams' pieces of batch / streams rows one after another, and a rank has the rows from
    rank * batch / ranks on. Where that cuts a piece, both ranks read the stream and each gives its part, so that any
    number of ranks sees the same batches. Raises ValueError when the batch does not divide evenly.
    """
    if batch % streams or batch % ranks:
        raise ValueError(f"a batch of {batch} does not divide evenly among {streams} streams and {ranks} ranks")
    piece, mine = batch // streams, batch // ranks
    start, stop = rank * mine, (rank + 1) * mine
    return [
        (stream, max(start - stream * piece, 0), min(stop - stream * piece, piece))
        for stream in range(start // piece, -(-stop // piece))
    ]


@dataclass(frozen=True)
class Order:
    """How the units of a snapshot are read."""

    n_units: int
    """Units of reading: runs of chunks."""
    streams: int
    window_units: int
    """Most units in one window of one stream."""
    seed: int
    block_rows: int = 1
    """Rows that stay together: see `rows_together`."""

    def windows(self, epoch: int, stream: int) -> list[NDArray[np.int64]]:
        """The unit numbers of each window, in order; none where there are fewer units than streams and this stream has
        no part. All are of one length, because a long one cannot be read while a short one is used up; but the first
        and the last share one, by stream, so that refills do not all come at once. Together the windows of all streams
        hold every unit once."""
        units = epoch_units(self.n_units, self.seed, epoch)[(stream + epoch) % self.streams :: self.streams]
        parts = self.windows_full * self.streams
        edges = [len(units) * part // parts for part in range(stream + 1, parts, self.streams)]
        return [window for window in np.split(units, edges) if len(window)]

    @property
    def windows_full(self) -> int:
        """How many windows of `window_units` an epoch of the longest stream takes."""
        return -(-self.n_units // (self.streams * self.window_units))

    @property
    def longest(self) -> int:
        """Units in the longest window."""
        return -(-self.n_units // (self.streams * self.windows_full))

    def places(self, epoch: int, n: int, full: int) -> NDArray[np.int32]:
        """The order in which the first n of a window's `full` places are given out. The windows of an epoch share it:
        what lies in a place is drawn anew for each, the order in which places are emptied need not be."""
        return window_places(n, full, self.seed, epoch, self.block_rows)


@lru_cache(maxsize=2)  # every stream asks for the same epoch's
def epoch_units(n_units: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return permutation(n_units, seed, EPOCH_CHUNKS, epoch)


@lru_cache(maxsize=8)  # a window's costs as much as reading a few of its chunks
def window_places(n: int, full: int, seed: int, epoch: int, block_rows: int) -> NDArray[np.int32]:
    blocks = permutation(-(-full // block_rows), seed, WINDOW_ROWS, epoch)
    places = (blocks[:, None] * block_rows + np.arange(block_rows)).reshape(-1)
    return places[places < n].astype(np.int32)


def rows_together(row_bytes: int, chunk_rows: int) -> int:
    """How many neighbouring rows of a chunk travel together: as many as make 16 kB, which memory gives out faster than
    single rows. They are no nearer to each other in the corpus than any two rows of their shard, whose rows are
    permuted; a chunk has at least 64 blocks. tests/test_shuffle.py measures what it costs in mixing."""
    most = max(1, min(BLOCK_BYTES // row_bytes, chunk_rows // 64))
    return 1 << most.bit_length() - 1


@dataclass(frozen=True)
class Position:
    """Where one stream stands: the next row it gives out."""

    epoch: int = 0
    window: int = 0
    offset: int = 0


def make_order(
    n_units: int, rows_per_unit: int, streams: int, window_rows: int, seed: int, block_rows: int = 1
) -> Order:
    """The order for a snapshot; `rows_per_unit` is a full run's. A small store is read in fewer streams (a divisor), so
    that each has enough units for all to end an epoch at about the same time."""
    most = max(1, n_units // UNITS_PER_STREAM)
    possible = max(v for v in range(1, streams + 1) if streams % v == 0 and v <= most)
    return Order(n_units, possible, max(1, window_rows // (possible * rows_per_unit)), seed, block_rows)


def heldout_contexts(spec: StoreSpec, tokens: int, seed: int) -> NDArray[np.int64]:
    """Contexts never trained on, sorted: enough for `tokens`, at most a tenth of the store, at least one.

    Drawn at random from the contexts of a few random shards, so that evaluation need not read the whole store.
    """
    wanted = max(1, min(-(-tokens // spec.context), spec.n_contexts // 10))
    first = np.arange(spec.n_contexts) * spec.context
    shards = first // spec.shard_rows
    pool = np.empty(0, np.int64)
    for shard in permutation(spec.n_shards, seed, HELDOUT, 0):
        pool = np.append(pool, np.flatnonzero(shards == shard))
        if len(pool) >= 4 * wanted:
            break
    return np.sort(pool[permutation(len(pool), seed, HELDOUT, 1)[:wanted]])


@dataclass(frozen=True)
class Split:
    """Which rows are trained on and which are measured on: [contexts, context] masks that share no context."""

    train: NDArray[np.bool_]
    heldout: NDArray[np.bool_]


def split(spec: StoreSpec, tokens: NDArray[Any], config: TrainConfig) -> Split:
    """Excluded positions and special tokens (if the configuration says so) are in neither mask."""
    usable = np.ones(tokens.shape, dtype=bool)
    if config.exclude_special:
        usable &= ~np.isin(tokens, spec.special_ids)
    positions = range(spec.skip_positions) if config.exclude_positions is None else config.exclude_positions
    usable[:, [p for p in positions if p < spec.context]] = False
    chosen = np.zeros((len(tokens), 1), dtype=bool)
    chosen[heldout_contexts(spec, config.heldout_tokens, config.seed)] = True
    return Split(usable & ~chosen, usable & chosen)
