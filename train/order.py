"""Who reads what, when: pure functions of (snapshot, seed, epoch, position), in numpy, without ranks.

An epoch is a permutation of the chunks, dealt to V virtual streams. A stream reads its chunks in windows and gives out
the rows of a window in random order; a global batch takes the same number of rows from every stream, so it does not
depend on how many processes share the streams. Position is all the state there is. Streams differ by a chunk or so in
length: when an epoch's worth of rows is given out, some have begun the next one and others have a rest to go (about 1 %
of the rows of a store of 150 chunks, less in larger ones). Who has the longer part changes from epoch to epoch.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shared.config import TrainConfig
from shared.permute import EPOCH_CHUNKS, HELDOUT, WINDOW_ROWS, permutation
from shared.store import StoreSpec

CHUNKS_PER_STREAM: Final = 16
"""At least so many chunks to a stream."""


@dataclass(frozen=True)
class Order:
    """How the chunks of a snapshot are read."""

    n_chunks: int
    streams: int
    window_chunks: int
    """Chunks in one window of one stream."""
    seed: int

    def windows(self, epoch: int, stream: int) -> list[NDArray[np.int64]]:
        """The chunk numbers of each window, in order. First windows are shorter by stream, so that refills do not
        all come at once; together the windows of all streams hold every chunk once."""
        chunks = epoch_chunks(self.n_chunks, self.seed, epoch)[(stream + epoch) % self.streams :: self.streams]
        first = max(1, self.window_chunks * (stream + 1) // self.streams)
        edges = list(range(first, len(chunks), self.window_chunks))
        return [window for window in np.split(chunks, edges) if len(window)]

    def rows(self, epoch: int, stream: int, window: int, n: int) -> NDArray[np.int64]:
        """The order in which the n rows of a window are given out."""
        return permutation(n, self.seed, WINDOW_ROWS, epoch, stream, window)


@lru_cache(maxsize=2)  # every stream asks for the same epoch's
def epoch_chunks(n_chunks: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return permutation(n_chunks, seed, EPOCH_CHUNKS, epoch)


@dataclass(frozen=True)
class Position:
    """Where one stream stands: the next row it gives out."""

    epoch: int = 0
    window: int = 0
    offset: int = 0


def make_order(n_chunks: int, chunk_rows: int, streams: int, window_rows: int, seed: int) -> Order:
    """The order for a snapshot. A small store is read in fewer streams (a divisor), so that each has enough chunks for
    all to end an epoch at about the same time."""
    most = max(1, n_chunks // CHUNKS_PER_STREAM)
    possible = max(v for v in range(1, streams + 1) if streams % v == 0 and v <= most)
    return Order(n_chunks, possible, max(1, window_rows // (possible * chunk_rows)), seed)


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
    usable[:, [p for p in config.exclude_positions if p < spec.context]] = False
    chosen = np.zeros((len(tokens), 1), dtype=bool)
    chosen[heldout_contexts(spec, config.heldout_tokens, config.seed)] = True
    return Split(usable & ~chosen, usable & chosen)
