"""Who reads what, when: pure functions of (snapshot, seed, epoch, position), in numpy, without ranks.

A unit of reading is a run: a few consecutive chunks of one shard. An epoch is a permutation of the runs, dealt to V
virtual streams. A stream reads its runs in windows and gives out the rows of a window in random order; a global batch
takes the same number of rows from every stream, so it does not depend on how many processes share it. Position is all
the state there is. Streams differ by a run or so in length: when an epoch's worth of rows is given out, some have begun
the next one and others have a rest to go (about 1 % of the rows of a store of 150 runs, less in larger ones). Who has
the longer part changes from epoch to epoch.
"""

import operator
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, overload

import numpy as np
from numpy.typing import NDArray

from shared.config import TrainConfig
from shared.permute import EPOCH_CHUNKS, HELDOUT, WINDOW_ROWS, permutation
from shared.store.spec import StoreSpec, are_special
from shared.store.tokens import TokenRows
from train.data.row_mask import RowMask

BLOCK_BYTES: Final = 16_384
CONTEXTS_AT_A_TIME: Final = 4096
UNITS_PER_STREAM: Final = 16
"""At least so many units to a stream."""


@dataclass(frozen=True)
class ChunkRun:
    """Consecutive chunks of one shard that are read together: one range request on an object store."""

    shard: int
    first: int
    """Number of the first chunk in the shard."""
    count: int
    """Chunks."""


@dataclass(frozen=True, eq=False)
class ChunkRuns(Sequence[ChunkRun]):
    """Many runs, worked out when they are asked for: what is kept is a few numbers a shard."""

    shards: NDArray[np.int64]
    """Sorted."""
    chunks: NDArray[np.int64]
    """Of each shard."""
    run_chunks: int
    ends: NDArray[np.int64]
    """Runs of all shards up to each of them."""

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @overload
    def __getitem__(self, number: int) -> ChunkRun: ...

    @overload
    def __getitem__(self, number: slice) -> list[ChunkRun]: ...

    def __getitem__(self, number: int | slice) -> ChunkRun | list[ChunkRun]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        place = int(np.searchsorted(self.ends, number, side="right"))
        before = int(self.ends[place - 1]) if place else 0
        first = (number - before) * self.run_chunks
        return ChunkRun(int(self.shards[place]), first, min(self.run_chunks, int(self.chunks[place]) - first))

    def __iter__(self) -> Iterator[ChunkRun]:
        for shard, chunks in zip(self.shards.tolist(), self.chunks.tolist(), strict=True):
            for first in range(0, chunks, self.run_chunks):
                yield ChunkRun(shard, first, min(self.run_chunks, chunks - first))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]


def runs(rows_per_shard: Mapping[int, int], chunk_rows: int, run_chunks: int) -> ChunkRuns:
    """Every chunk that exists, once, in runs of `run_chunks` that do not cross shards; a shard's last may be shorter,
    and its last chunk partly filled. By shard, whatever the order of the mapping: a run's place is its unit number."""
    shards = np.array(sorted(rows_per_shard), np.int64)
    rows = np.array([rows_per_shard[shard] for shard in shards.tolist()], np.int64)
    return runs_of(shards, rows, chunk_rows, run_chunks)


def runs_of(shards: NDArray[np.int64], rows: NDArray[np.int64], chunk_rows: int, run_chunks: int) -> ChunkRuns:
    """The same, of sorted shards and the rows of each."""
    chunks = -(-rows // chunk_rows)
    return ChunkRuns(shards, chunks, run_chunks, np.cumsum(-(-chunks // run_chunks)))


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
class ReadOrder:
    """How the units of a snapshot are read."""

    n_units: int
    """Units of reading: runs of chunks."""
    streams: int
    window_units: int
    """Most units in one window of one stream."""
    seed: int
    block_rows: int = 1
    """Rows that stay together: see `rows_together`."""

    def windows(self, epoch: int, stream: int) -> "WindowPlan":
        """The unit numbers of each window, in order; none where there are fewer units than streams and this stream has
        no part. All are of one length, because a long one cannot be read while a short one is used up; but the first
        and the last share one, by stream, so that refills do not all come at once. Together the windows of all streams
        hold every unit once."""
        with LAYING_OUT:  # every stream asks for the same epoch's, from a thread of its own
            return laid_out(self, epoch)[stream]

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


@dataclass(frozen=True, eq=False)
class WindowPlan(Sequence[NDArray[np.int64]]):
    """Of one stream in one epoch."""

    units: NDArray[np.int64]
    """All of the stream's."""
    edges: NDArray[np.int64]
    """Where each window begins, and the last one ends."""

    def __len__(self) -> int:
        return len(self.edges) - 1

    @overload
    def __getitem__(self, number: int) -> NDArray[np.int64]: ...

    @overload
    def __getitem__(self, number: slice) -> list[NDArray[np.int64]]: ...

    def __getitem__(self, number: int | slice) -> NDArray[np.int64] | list[NDArray[np.int64]]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        return self.units[self.edges[number] : self.edges[number + 1]]


LAYING_OUT: Final = threading.Lock()


@lru_cache(maxsize=2)  # an epoch and the next one, which some streams have begun
def laid_out(order: ReadOrder, epoch: int) -> list[WindowPlan]:
    """Every stream's windows of an epoch."""
    every = permutation(order.n_units, order.seed, EPOCH_CHUNKS, epoch)
    return [windows_of(order, every[(v + epoch) % order.streams :: order.streams], v) for v in range(order.streams)]


def windows_of(order: ReadOrder, units: NDArray[np.int64], stream: int) -> WindowPlan:
    """A stream's units cut into windows, of which none is empty."""
    parts = order.windows_full * order.streams
    cuts = len(units) * np.arange(stream + 1, parts, order.streams) // max(1, parts)
    return WindowPlan(units, np.unique(np.concatenate([[0], cuts, [len(units)]])))


@lru_cache(maxsize=8)  # a window's costs as much as reading a few of its chunks
def window_places(n: int, full: int, seed: int, epoch: int, block_rows: int) -> NDArray[np.int32]:
    blocks = permutation(-(-full // block_rows), seed, WINDOW_ROWS, epoch)
    places = (blocks[:, None] * block_rows + np.arange(block_rows)).reshape(-1)
    return places[places < n].astype(np.int32)


def rows_together(row_bytes: int, chunk_rows: int) -> int:
    """How many neighbouring rows of a chunk travel together: as many as make 16 kB, which memory gives out faster than
    single rows. They are no nearer to each other in the corpus than any two rows of their shard, whose rows are
    permuted; a chunk has at least 64 blocks. tests/train/test_shuffle.py measures what it costs in mixing."""
    most = max(1, min(BLOCK_BYTES // row_bytes, chunk_rows // 64))
    return 1 << most.bit_length() - 1


@dataclass(frozen=True)
class StreamPosition:
    """Where one stream stands: the next row it gives out."""

    epoch: int = 0
    window: int = 0
    offset: int = 0


def make_order(
    n_units: int, rows_per_unit: int, streams: int, window_rows: int, seed: int, block_rows: int = 1
) -> ReadOrder:
    """The order for a snapshot; `rows_per_unit` is a full run's. A small store is read in fewer streams (a divisor), so
    that each has enough units for all to end an epoch at about the same time."""
    most = max(1, n_units // UNITS_PER_STREAM)
    possible = max(v for v in range(1, streams + 1) if streams % v == 0 and v <= most)
    return ReadOrder(n_units, possible, max(1, window_rows // (possible * rows_per_unit)), seed, block_rows)


def heldout_contexts(spec: StoreSpec, tokens: int, seed: int) -> NDArray[np.int64]:
    """Contexts never trained on, sorted: enough for `tokens`, at most a tenth of the store, at least one.

    Drawn at random from the contexts of a few random shards, so that evaluation need not read the whole store.
    """
    wanted = max(1, min(-(-tokens // spec.context), spec.n_contexts // 10))
    pool, found = list[NDArray[np.int64]](), 0
    for shard in permutation(spec.n_shards, seed, HELDOUT, 0).tolist():
        first, last = (-(-at * spec.shard_rows // spec.context) for at in (shard, shard + 1))
        pool.append(np.arange(first, min(last, spec.n_contexts)))  # the contexts that begin in it
        found += len(pool[-1])
        if found >= 4 * wanted:
            break
    contexts = np.concatenate(pool)
    return np.sort(contexts[permutation(len(contexts), seed, HELDOUT, 1)[:wanted]])


@dataclass(frozen=True)
class Split:
    """Which rows are trained on and which are measured on: [contexts, context] masks that share no context."""

    train: NDArray[np.bool_] | RowMask
    heldout: NDArray[np.bool_] | RowMask


def split(spec: StoreSpec, tokens: NDArray[Any], config: TrainConfig) -> Split:
    """Excluded positions and special tokens (if the configuration says so) are in neither mask."""
    usable = usable_rows(spec, tokens, config)
    chosen = np.zeros((len(tokens), 1), dtype=bool)
    chosen[heldout_contexts(spec, config.heldout_tokens, config.seed)] = True
    return Split(usable & ~chosen, usable & chosen)


def split_rows(tokens: TokenRows, config: TrainConfig) -> Split:
    """The same in bits, without all token ids in memory. Raises DamagedError when they are not what was written."""
    spec = tokens.spec
    usable = RowMask.packed(tokens.shape, (usable_rows(spec, block, config) for block in tokens.blocks()))
    chosen, places = heldout_contexts(spec, config.heldout_tokens, config.seed), np.arange(spec.context)
    train, heldout = usable, RowMask(tokens.shape, np.zeros_like(usable.bits))
    for at in range(0, len(chosen), CONTEXTS_AT_A_TIME):
        some = chosen[at : at + CONTEXTS_AT_A_TIME]
        rows = (some[:, None] * spec.context + places)[usable.of_contexts(some)]
        heldout.set_(rows, True)
        train.set_(rows, False)
    return Split(train, heldout)


def usable_rows(spec: StoreSpec, tokens: NDArray[Any], config: TrainConfig) -> NDArray[np.bool_]:
    """Of some contexts, [contexts, context]: all but excluded positions and special tokens."""
    usable = ~are_special(tokens, spec.special_ids) if config.exclude_special else np.ones(tokens.shape, dtype=bool)
    positions = range(spec.skip_positions) if config.exclude_positions is None else config.exclude_positions
    usable[:, [p for p in positions if p < spec.context]] = False
    return usable


def rows_in_shards(marks: NDArray[np.bool_] | RowMask, spec: StoreSpec, shards: NDArray[np.int64]) -> int:
    """How many rows of some shards are marked. `shards`: sorted."""
    found = RowMask.of(marks)
    neighbours = np.split(shards, np.flatnonzero(np.diff(shards) > 1) + 1) if len(shards) else []
    return sum(found.count(spec.shard_range(int(s[0]))[0], spec.shard_range(int(s[-1]))[1]) for s in neighbours)
