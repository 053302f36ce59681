"""From windows in memory to batches on the device.

While one window of a stream is used, its next one is read ahead (train/data/loader.py). A batch is one gather over all
streams, on the device, where int8 rows become numbers. A stream resumes from a position by reading its window again.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from shared.errors import UserError
from train.data.loader import Loader, Window
from train.data.order import StreamPosition


class StopWaiting(Exception):
    """A stop was asked for while the rows of the next batch were still to come."""


class VirtualStream:
    """One of the V streams: its windows, one after another, epoch after epoch.

    Rows are gathered after several streams have said where theirs are. Until then no window may be read into the memory
    that they lie in: the next one is read ahead when `read_ahead` says that the gathers are done.
    """

    def __init__(self, loader: Loader, number: int, at: StreamPosition) -> None:
        self.loader, self.number, self.at, self.turn = loader, number, at, 0
        self.offset, self.last_epoch = at.offset, at.epoch
        self.passed = 0
        """Rows given out or left out, of which the loader was not told yet."""
        self.until = 0
        """Rows from where it began to the end of its window, where the next one is needed."""
        self.window: Window | None = None
        self.following: Future[Any] | None = loader.windows.submit(self.load_from, at, self.turn, self.until)

    def load_from(self, at: StreamPosition, turn: int, needed: int) -> tuple[StreamPosition, Window]:
        """The window at a position, or the next one that there is: a stream may have no part in a small pass."""
        epoch, window, offset = at.epoch, at.window, at.offset
        while window >= len(self.loader.passes.get(epoch).order.windows(epoch, self.number)):
            epoch, window, offset = epoch + 1, 0, 0
        return StreamPosition(epoch, window, offset), self.loader.load(self.number, epoch, window, turn, needed)

    def enter(self, wait: Callable[[Future[Any]], Any]) -> Window | None:
        """The window that the stream stands in, waiting for it where it must; None when `read_ahead` has to come first.
        Raises UserError when two epochs had nothing to give."""
        while self.window is None and self.following is not None:
            self.at, found = wait(self.following)
            self.following = None
            self.turn ^= 1
            self.passed += min(self.at.offset, found.rows)
            if self.at.offset < found.rows:
                self.window, self.offset, self.last_epoch = found, self.at.offset, self.at.epoch
                self.until += found.rows - self.offset
                self.loader.await_copy(found)
            elif self.at.epoch - self.last_epoch > 2:
                raise UserError("too few activations are left to train on. Harvest more tokens, or lower streams")
            else:
                self.at, self.offset = StreamPosition(self.at.epoch, self.at.window + 1), 0
        return self.window

    def advance(self, stop: int) -> None:
        """The window's rows up to `stop` are taken."""
        self.passed += stop - self.offset
        self.offset = stop
        assert self.window is not None
        if stop == self.window.rows:
            self.at, self.window, self.offset = StreamPosition(self.at.epoch, self.at.window + 1), None, 0

    def read_ahead(self) -> None:
        """All rows that were taken are gathered: the memory of the window before this one is free."""
        if self.following is None:
            after = self.at if self.window is None else StreamPosition(self.at.epoch, self.at.window + 1)
            self.loader.release((self.number, self.turn))
            self.following = self.loader.windows.submit(self.load_from, after, self.turn, self.until)

    def stands(self) -> StreamPosition:
        """The next row to give out."""
        return StreamPosition(self.at.epoch, self.at.window, self.offset)


class BatchStream:
    """Endless batches [rows, d_in] on the device: this rank's share of each global batch. Bfloat16 rows stay that,
    quantised ones become float32."""

    def __init__(
        self,
        loader: Loader,
        shares: Sequence[tuple[int, int, int]],
        rows_per_stream: int,
        positions: Sequence[StreamPosition],
        stop_asked: Callable[[], bool] = lambda: False,
    ) -> None:
        """`shares`: (stream, lo, hi), the part of a stream's piece that this rank gives out (train.data.order)."""
        self.loader, self.shares, self.rows_per_stream, self.stop_asked = loader, shares, rows_per_stream, stop_asked
        self.streams = {v: VirtualStream(loader, v, positions[v]) for v, _, _ in shares}
        self.rows = sum(hi - lo for _, lo, hi in shares)
        self.waited = 0.0
        """Seconds spent waiting for windows."""
        self.whole = self.stands()
        self.batch: Tensor | None = None
        self.places: list[Tensor] = []
        """Of rows that are taken and not yet gathered."""
        self.filled = 0

    def next_batch(self) -> Float[Tensor, "rows d_in"]:
        """Valid until the next call, which writes over it. Raises StopWaiting when a stop is asked for while the rows
        are still to come; the positions stay those before this batch."""
        for number, lo, hi in self.shares:
            stream, given = self.streams[number], 0
            while given < self.rows_per_stream:
                window = stream.enter(self.wait)
                if window is None:
                    self.gather()
                    continue
                start = stream.offset - given  # where the piece would begin in this window
                upto = min(self.rows_per_stream, window.rows - start)
                first, last = max(lo, given), min(hi, upto)
                if last > first:
                    self.places.append(window.order[start + first : start + last])
                stream.advance(start + upto)
                given = upto
        self.gather()
        self.filled, self.whole = 0, self.stands()
        assert self.batch is not None
        return self.batch

    def gather(self) -> None:
        """The rows taken so far into the batch, in one gather for all streams; then windows may be read ahead."""
        memory = self.loader.memory
        if self.places and memory is not None:
            places = torch.cat(self.places)
            if self.batch is None:
                self.batch = memory.batch(self.rows)
            memory.gather(places, self.loader.unit_rows, self.batch[self.filled : self.filled + len(places)])
            self.filled += len(places)
            self.places.clear()
        for stream in self.streams.values():
            stream.read_ahead()
        self.loader.lead.take(sum(stream.passed for stream in self.streams.values()))
        for stream in self.streams.values():
            stream.passed = 0

    def wait(self, future: Future[Any]) -> Any:
        started = time.monotonic()
        try:
            with nullcontext() if future.done() else self.loader.lead.awaited():
                while True:
                    try:
                        return future.result(timeout=0.2)
                    except TimeoutError:
                        if future.done():
                            raise
                        if self.stop_asked():
                            raise StopWaiting from None
        finally:
            self.waited += time.monotonic() - started

    def stands(self) -> dict[int, StreamPosition]:
        return {number: stream.stands() for number, stream in self.streams.items()}

    def positions(self) -> dict[int, StreamPosition]:
        """Where each of this rank's streams stands after the last whole batch: all that is needed to go on."""
        return self.whole

    def close(self) -> None:
        self.loader.close()
