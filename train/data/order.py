"""The order in which rows are read: pure numpy functions of (snapshot, seed, epoch, position), independent of ranks.

A unit of reading is a run of a few consecutive chunks of one shard. An epoch is a permutation of the units, dealt to V
virtual streams. A stream reads its units in windows and gives out the rows of a window in random order. A global batch
takes the same number of rows from every stream, so it does not depend on how many processes share it. The streams'
positions are the only state. Streams differ in length by about one unit: after an epoch's worth of rows, some streams
have begun the next epoch and others still have rows left (about 1 % of the rows of a store of 150 units, less in larger
ones). Which streams are longer changes from epoch to epoch.
"""

import operator
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Protocol, overload, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from shared.permute import EPOCH_CHUNKS, HELDOUT, WINDOW_ROWS, permutation
from shared.store.spec import StoreSpec, are_special
from shared.store.tokens import TokenRows
from train.data.row_mask import RowMask

BLOCK_BYTES: Final = 16_384
CONTEXTS_AT_A_TIME: Final = 4096
UNITS_PER_STREAM: Final = 16
"""The fewest units per stream; small stores are read in fewer streams."""


@dataclass(frozen=True)
class ChunkRun:
    """A run of consecutive chunks of one shard that are read together: one range request on an object store."""

    shard: int
    first: int
    """Number of the first chunk in the shard."""
    count: int
    """Number of chunks."""


@dataclass(frozen=True, eq=False)
class ChunkRuns(Sequence[ChunkRun]):
    """All runs of some shards. Each is worked out on access; only a few numbers per shard are in memory."""

    shards: NDArray[np.int64]
    """Shard numbers, sorted."""
    chunks: NDArray[np.int64]
    """Number of chunks in each shard."""
    run_chunks: int
    ends: NDArray[np.int64]
    """Cumulative number of runs up to and including each shard."""

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
    """Returns every chunk that exists once, in runs of `run_chunks` that do not cross shards. A shard's last run may be
    shorter, and its last chunk partly filled. Runs are sorted by shard; a run's index is its unit number."""
    shards = np.array(sorted(rows_per_shard), np.int64)
    rows = np.array([rows_per_shard[shard] for shard in shards.tolist()], np.int64)
    return runs_of(shards, rows, chunk_rows, run_chunks)


def runs_of(shards: NDArray[np.int64], rows: NDArray[np.int64], chunk_rows: int, run_chunks: int) -> ChunkRuns:
    """Like `runs`, for sorted `shards` and the number of rows in each."""
    chunks = -(-rows // chunk_rows)
    return ChunkRuns(shards, chunks, run_chunks, np.cumsum(-(-chunks // run_chunks)))


def share(batch: int, streams: int, rank: int, ranks: int) -> list[tuple[int, int, int]]:
    """Returns a rank's share of every global batch: (stream, lo, hi), rows lo to hi of that stream's piece.

    A global batch is the streams' pieces of batch / streams rows one after another. A rank has the batch / ranks rows
    from rank * batch / ranks on. Where that cuts a piece, both ranks read the stream and each gives out its part, so
    that any number of ranks sees the same batches. Raises ValueError when the batch does not divide evenly.
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
    """The order in which the units of a snapshot are read."""

    n_units: int
    """Number of units of reading (runs of chunks)."""
    streams: int
    window_units: int
    """Maximum units in one window of one stream."""
    seed: int
    block_rows: int = 1
    """Number of neighbouring rows that stay together (see `rows_together`)."""

    def windows(self, epoch: int, stream: int) -> "WindowPlan":
        """Returns the unit numbers of each window, in order. A stream has no window in an epoch with fewer units than
        streams. All windows have one length, because a long window cannot be read in the time in which a short one is
        used up. The first and the last window together have that length, split differently in each stream, so that
        refills do not all come at once. The windows of all streams together hold every unit once."""
        with LAYING_OUT:  # every stream's thread asks for the same epoch
            return laid_out(self, epoch)[stream]

    @property
    def windows_full(self) -> int:
        """Number of windows of `window_units` in an epoch of the longest stream."""
        return -(-self.n_units // (self.streams * self.window_units))

    @property
    def longest(self) -> int:
        """Number of units in the longest window."""
        return -(-self.n_units // (self.streams * self.windows_full))

    def places(self, epoch: int, n: int, full: int) -> NDArray[np.int32]:
        """Returns the order in which the first n of a window's `full` places are given out. All windows of an epoch
        share it: which units lie in which place is random for each window, so the order of places need not be."""
        return window_places(n, full, self.seed, epoch, self.block_rows)


@dataclass(frozen=True, eq=False)
class WindowPlan(Sequence[NDArray[np.int64]]):
    """The windows of one stream in one epoch: a sequence of arrays of unit numbers."""

    units: NDArray[np.int64]
    """All units of the stream."""
    edges: NDArray[np.int64]
    """The index at which each window begins, and the end of the last one."""

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
    """Returns the windows of every stream in an epoch."""
    every = permutation(order.n_units, order.seed, EPOCH_CHUNKS, epoch)
    return [windows_of(order, every[(v + epoch) % order.streams :: order.streams], v) for v in range(order.streams)]


def windows_of(order: ReadOrder, units: NDArray[np.int64], stream: int) -> WindowPlan:
    """Cuts a stream's units into windows, none of them empty."""
    parts = order.windows_full * order.streams
    cuts = len(units) * np.arange(stream + 1, parts, order.streams) // max(1, parts)
    return WindowPlan(units, np.unique(np.concatenate([[0], cuts, [len(units)]])))


@lru_cache(maxsize=8)  # working it out costs as much as reading a few chunks of the window
def window_places(n: int, full: int, seed: int, epoch: int, block_rows: int) -> NDArray[np.int32]:
    """See `ReadOrder.places`."""
    blocks = permutation(-(-full // block_rows), seed, WINDOW_ROWS, epoch)
    places = (blocks[:, None] * block_rows + np.arange(block_rows)).reshape(-1)
    return places[places < n].astype(np.int32)


def rows_together(row_bytes: int, chunk_rows: int) -> int:
    """Returns how many neighbouring rows of a chunk are shuffled as one block: about 16 kB, which is copied faster than
    single rows. Rows of a block are no nearer to each other in the corpus than any two rows of their shard, because a
    shard's rows are permuted. A chunk has at least 64 blocks. tests/train/test_shuffle.py measures the effect on
    mixing."""
    most = max(1, min(BLOCK_BYTES // row_bytes, chunk_rows // 64))
    return 1 << most.bit_length() - 1


@dataclass(frozen=True)
class StreamPosition:
    """The next row that one stream gives out: `offset` rows into a window of an epoch."""

    epoch: int = 0
    window: int = 0
    offset: int = 0


def make_order(
    n_units: int, rows_per_unit: int, streams: int, window_rows: int, seed: int, block_rows: int = 1
) -> ReadOrder:
    """Returns the order for a snapshot. `rows_per_unit`: rows in a full unit. A small store is read in fewer streams (a
    divisor of `streams`), so that each has enough units for all to end an epoch at about the same time."""
    most = max(1, n_units // UNITS_PER_STREAM)
    possible = max(v for v in range(1, streams + 1) if streams % v == 0 and v <= most)
    return ReadOrder(n_units, possible, max(1, window_rows // (possible * rows_per_unit)), seed, block_rows)


def heldout_contexts(spec: StoreSpec, tokens: int, seed: int) -> NDArray[np.int64]:
    """Returns the held-out contexts, sorted: enough for `tokens`, at most a tenth of the store, at least one.

    They are drawn at random from a few random shards, so that evaluation need not read the whole store.
    """
    wanted = max(1, min(-(-tokens // spec.context), spec.n_contexts // 10))
    pool, found = list[NDArray[np.int64]](), 0
    for shard in permutation(spec.n_shards, seed, HELDOUT, 0).tolist():
        first, last = (-(-edge * spec.shard_rows // spec.context) for edge in (shard, shard + 1))
        pool.append(np.arange(first, min(last, spec.n_contexts)))  # the contexts that begin in this shard
        found += len(pool[-1])
        if found >= 4 * wanted:
            break
    contexts = np.concatenate(pool)
    return np.sort(contexts[permutation(len(contexts), seed, HELDOUT, 1)[:wanted]])


@runtime_checkable
class SplitSettings(Protocol):
    """The settings that decide which rows are held out, as TrainConfig has them."""

    @property
    def seed(self) -> int: ...

    @property
    def heldout_tokens(self) -> int: ...

    @property
    def exclude_positions(self) -> tuple[int, ...] | None: ...

    @property
    def exclude_special(self) -> bool: ...


@dataclass(frozen=True)
class Split:
    """The rows that are trained on and those that are measured on: [contexts, context] masks that share no context."""

    train: NDArray[np.bool_] | RowMask
    heldout: NDArray[np.bool_] | RowMask


def split(spec: StoreSpec, tokens: NDArray[Any], config: SplitSettings) -> Split:
    """Returns both masks. Excluded positions, and special tokens with `exclude_special`, are in neither."""
    usable = usable_rows(spec, tokens, config)
    chosen = np.zeros((len(tokens), 1), dtype=bool)
    chosen[heldout_contexts(spec, config.heldout_tokens, config.seed)] = True
    return Split(usable & ~chosen, usable & chosen)


def split_rows(tokens: TokenRows, config: SplitSettings) -> Split:
    """Like `split`, with masks in bits and without all token ids in memory. Raises DamagedError when the ids are not
    what was written."""
    spec = tokens.spec
    usable = RowMask.packed(tokens.shape, (usable_rows(spec, block, config) for block in tokens.blocks()))
    chosen, places = heldout_contexts(spec, config.heldout_tokens, config.seed), np.arange(spec.context)
    train, heldout = usable, RowMask(tokens.shape, np.zeros_like(usable.bits))
    for start in range(0, len(chosen), CONTEXTS_AT_A_TIME):
        some = chosen[start : start + CONTEXTS_AT_A_TIME]
        rows = (some[:, None] * spec.context + places)[usable.of_contexts(some)]
        heldout.set_(rows, True)
        train.set_(rows, False)
    return Split(train, heldout)


def usable_rows(spec: StoreSpec, tokens: NDArray[Any], config: SplitSettings) -> NDArray[np.bool_]:
    """Returns a mask [contexts, context] of all rows but excluded positions and special tokens."""
    usable = ~are_special(tokens, spec.special_ids) if config.exclude_special else np.ones(tokens.shape, dtype=bool)
    usable[:, excluded_positions(spec, config)] = False
    return usable


def excluded_positions(spec: StoreSpec, config: SplitSettings) -> list[int]:
    """Returns the positions of a context that count neither in training nor in an evaluation."""
    positions = range(spec.skip_positions) if config.exclude_positions is None else config.exclude_positions
    return [position for position in positions if position < spec.context]


def rows_in_shards(marks: NDArray[np.bool_] | RowMask, spec: StoreSpec, shards: NDArray[np.int64]) -> int:
    """Returns how many rows of the given shards are marked. `shards` must be sorted."""
    found = RowMask.of(marks)
    neighbours = np.split(shards, np.flatnonzero(np.diff(shards) > 1) + 1) if len(shards) else []
    return sum(found.count(spec.shard_range(int(s[0]))[0], spec.shard_range(int(s[-1]))[1]) for s in neighbours)
