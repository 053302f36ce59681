"""Windows of rows from a store's committed shards to batches on the device. The next window is read while the current
one is used; memory is two windows a stream. Resumes from a position by reading that
window again."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import UserError
from shared.reader import ArrayReader
from shared.store import Store
from train.order import Order, Position


@dataclass(frozen=True)
class Rows:
    """The activations of one hookpoint, each row with the place in the corpus it came from."""

    activations: ArrayReader
    contexts: ArrayReader
    positions: ArrayReader

    @classmethod
    def of(cls, store: Store, hook: str) -> "Rows":
        return cls(*(ArrayReader(store, array) for array in (hook, "index/context", "index/position")))

    def chunks(self) -> list[tuple[int, int]]:
        """(shard, chunk) of every chunk that exists."""
        commits, rows = self.activations.store.commits, self.activations.layout.chunk_rows
        return [(shard, chunk) for shard, commit in commits.items() for chunk in range(-(-commit.rows // rows))]

    def kept(self, shard: int, chunk: int, keep: NDArray[np.bool_]) -> NDArray[Any]:
        """The rows of a chunk whose (context, position) is marked in `keep` [contexts, context]."""
        marked = keep[self.contexts.read(shard, chunk), self.positions.read(shard, chunk)]
        rows: NDArray[Any] = self.activations.read(shard, chunk)[marked]
        return rows


def to_tensor(rows: NDArray[Any], dtype: str) -> Float[Tensor, "rows d_in"]:
    """Stored rows as a tensor of their logical data type, without a copy."""
    tensor = torch.from_numpy(rows)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


@dataclass(frozen=True)
class Readers:
    """Threads: one reads windows, one after another, for all streams; the others decode a window's chunks."""

    windows: ThreadPoolExecutor
    chunks: ThreadPoolExecutor

    @classmethod
    def start(cls) -> "Readers":
        cores = len(os.sched_getaffinity(0))
        return cls(
            ThreadPoolExecutor(1, thread_name_prefix="window"), ThreadPoolExecutor(cores, thread_name_prefix="decode")
        )


class VirtualStream:
    """One of the V streams: its windows, one after another, epoch after epoch."""

    def __init__(
        self, rows: Rows, order: Order, keep: NDArray[np.bool_], number: int, at: Position, readers: Readers
    ) -> None:
        self.rows, self.order, self.keep, self.number, self.readers = rows, order, keep, number, readers
        self.chunks = rows.chunks()
        self.at = at
        self.window: NDArray[Any] = self.load(at.epoch, at.window)
        self.following: Future[NDArray[Any]] = self.read_ahead()

    def load(self, epoch: int, window: int) -> NDArray[Any]:
        """The rows of one window in the order in which they are given out."""
        chunks = [self.chunks[int(chunk)] for chunk in self.order.windows(epoch, self.number)[window]]
        rows = np.concatenate(list(self.readers.chunks.map(lambda at: self.rows.kept(at[0], at[1], self.keep), chunks)))
        return rows[self.order.rows(epoch, self.number, window, len(rows))]

    def after(self, at: Position) -> Position:
        last = at.window + 1 == len(self.order.windows(at.epoch, self.number))
        return Position(at.epoch + 1, 0) if last else Position(at.epoch, at.window + 1)

    def read_ahead(self) -> Future[NDArray[Any]]:
        following = self.after(self.at)
        return self.readers.windows.submit(self.load, following.epoch, following.window)

    def take(self, n: int) -> Iterator[NDArray[Any]]:
        """The next n rows, in one or more pieces. Raises UserError when an epoch of this stream has none."""
        empty = 0
        while n:
            piece = self.window[self.at.offset : self.at.offset + n]
            empty = 0 if len(piece) else empty + 1
            if empty > 2 * len(self.order.windows(self.at.epoch, self.number)):
                raise UserError("too few activations are left to train on. Harvest more tokens, or lower streams")
            self.at = Position(self.at.epoch, self.at.window, self.at.offset + len(piece))
            n -= len(piece)
            yield piece
            if self.at.offset == len(self.window):
                self.at = self.after(self.at)
                self.window = self.following.result()
                self.following = self.read_ahead()


class BatchStream:
    """Endless batches [batch, d_in] from some of the streams, in the stored data type, on the host.

    A rank serves the streams `serves` and gives out its share of each global batch.
    """

    def __init__(
        self,
        rows: Rows,
        order: Order,
        keep: NDArray[np.bool_],
        batch: int,
        serves: Sequence[int],
        positions: Sequence[Position],
    ) -> None:
        self.readers = Readers.start()
        self.rows_per_stream = batch // order.streams
        self.dtype = rows.activations.store.spec.dtype
        self.streams = [VirtualStream(rows, order, keep, v, positions[v], self.readers) for v in serves]

    def next_batch(self) -> Float[Tensor, "batch d_in"]:
        pieces = [piece for stream in self.streams for piece in stream.take(self.rows_per_stream)]
        return to_tensor(np.concatenate(pieces), self.dtype)

    def positions(self) -> dict[int, Position]:
        """Where each of this rank's streams stands: all that is needed to go on from here."""
        return {stream.number: stream.at for stream in self.streams}

    def close(self) -> None:
        self.readers.windows.shutdown(cancel_futures=True)
        self.readers.chunks.shutdown()
