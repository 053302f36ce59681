"""Makes batches on the device from windows in memory.

While one window of a stream is used, its next one is read ahead (train/data/loader.py). A batch is one gather over all
streams, on the device, where int8 rows are dequantised. A stream resumes from a position by reading its window again.
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
    """Raised when a stop is asked for while the next batch is not complete."""


class VirtualStream:
    """One of the V streams: its windows one after another, epoch after epoch.

    A batch first takes places in the windows of all streams and then gathers their rows at once. Until that gather is
    done, no window may be read into the memory of a window just left: `read_ahead` is called after the gather and
    starts the next read.
    """

    def __init__(self, loader: Loader, number: int, start: StreamPosition) -> None:
        self.loader, self.number, self.at, self.turn = loader, number, start, 0
        self.offset, self.last_epoch = start.offset, start.epoch
        self.passed = 0
        """Rows given out or skipped that are not yet counted in the loader's `pace`."""
        self.until = 0
        """Rows from the stream's start to the end of its current window, where the next window is needed."""
        self.window: Window | None = None
        self.following: Future[Any] | None = loader.window_pool.submit(self.load_from, start, self.turn, self.until)
        """The read of the next window; None until it is submitted."""

    def load_from(self, start: StreamPosition, turn: int, needed: int) -> tuple[StreamPosition, Window]:
        """Reads the window at a position, or the next one that exists: a small pass may have no window for this
        stream."""
        epoch, window, offset = start.epoch, start.window, start.offset
        while window >= len(self.loader.passes.get(epoch).order.windows(epoch, self.number)):
            epoch, window, offset = epoch + 1, 0, 0
        return StreamPosition(epoch, window, offset), self.loader.load(self.number, epoch, window, turn, needed)

    def current_window(self, wait: Callable[[Future[Any]], Any]) -> Window | None:
        """Returns the window that holds the stream's next row, and waits for it if needed. Returns None when
        `read_ahead` must be called first. Raises UserError when two epochs held no row."""
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
        """Moves on to row `stop` of the window; leaves the window at its end."""
        self.passed += stop - self.offset
        self.offset = stop
        assert self.window is not None
        if stop == self.window.rows:
            self.at, self.window, self.offset = StreamPosition(self.at.epoch, self.at.window + 1), None, 0

    def read_ahead(self) -> None:
        """Starts reading the next window unless it is being read. Call it only after all rows taken so far were
        gathered, because the read overwrites the window before this one."""
        if self.following is None:
            after = self.at if self.window is None else StreamPosition(self.at.epoch, self.at.window + 1)
            self.loader.release((self.number, self.turn))
            self.following = self.loader.window_pool.submit(self.load_from, after, self.turn, self.until)

    def position(self) -> StreamPosition:
        """Returns the position of the next row to give out."""
        return StreamPosition(self.at.epoch, self.at.window, self.offset)


class BatchStream:
    """Endless batches [rows, d_in] on the device: this rank's share of each global batch. Rows keep their stored type;
    int8 rows become float32."""

    def __init__(
        self,
        loader: Loader,
        shares: Sequence[tuple[int, int, int]],
        rows_per_stream: int,
        positions: Sequence[StreamPosition],
        stop_asked: Callable[[], bool] = lambda: False,
    ) -> None:
        """`shares`: (stream, lo, hi), the part of each stream's piece that this rank gives out (train.data.order).
        `positions`: the start of every stream. `stop_asked` is polled while a batch waits for rows."""
        self.loader, self.shares, self.rows_per_stream, self.stop_asked = loader, shares, rows_per_stream, stop_asked
        self.streams = {v: VirtualStream(loader, v, positions[v]) for v, _, _ in shares}
        self.rows = sum(hi - lo for _, lo, hi in shares)
        self.waited = 0.0
        """Seconds spent waiting for windows."""
        self.after_batch = self.stream_positions()
        self.batch: Tensor | None = None
        self.places: list[Tensor] = []
        """Places in memory of the rows that are taken and not yet gathered."""
        self.filled = 0
        """Rows of the batch that are gathered."""

    def next_batch(self) -> Float[Tensor, "rows d_in"]:
        """Returns the next batch, which the following call overwrites. Raises StopWaiting when a stop is asked for
        while it waits for rows; `positions` are then those before this batch."""
        for number, lo, hi in self.shares:
            stream, given = self.streams[number], 0
            while given < self.rows_per_stream:
                window = stream.current_window(self.wait)
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
        self.filled, self.after_batch = 0, self.stream_positions()
        assert self.batch is not None
        return self.batch

    def gather(self) -> None:
        """Copies the rows taken so far into the batch, in one gather for all streams, and starts reading next
        windows."""
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
        self.loader.pace.take(sum(stream.passed for stream in self.streams.values()))
        for stream in self.streams.values():
            stream.passed = 0

    def wait(self, future: Future[Any]) -> Any:
        """Returns the future's result; polls `stop_asked` and adds the time to `waited`."""
        started = time.monotonic()
        try:
            with nullcontext() if future.done() else self.loader.pace.lifted_while_waiting():
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

    def stream_positions(self) -> dict[int, StreamPosition]:
        return {number: stream.position() for number, stream in self.streams.items()}

    def positions(self) -> dict[int, StreamPosition]:
        """Returns the position of each of this rank's streams after the last whole batch: all that a resume needs."""
        return self.after_batch

    def close(self) -> None:
        self.loader.close()
