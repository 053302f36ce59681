"""Windows of rows from a store's committed shards to batches on the device.

While one window of a stream is used, its next one is read by threads in the background: decoded where it will lie,
then (on CUDA) copied to the device, so that memory is two windows and what is being decoded. Rows are gathered, and
int8 rows turned into numbers, on the device, batch by batch. A stream resumes from a position by reading that window
again.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import UserError
from train.order import Order, Position, Run
from train.rows import Kept, Rows, to_tensor

Verify = Literal["always", "first-epoch", "off"]


@dataclass(frozen=True)
class Pass:
    """One time through some committed shards."""

    rows: Rows
    kept: Kept
    units: list[Run]
    order: Order


@runtime_checkable
class Passes(Protocol):
    """What is read in each epoch."""

    def get(self, epoch: int) -> Pass:
        """May wait for a harvest that goes on."""
        ...

    def close(self) -> None:
        """Ends a wait."""
        ...


@dataclass(frozen=True)
class Same:
    """The same snapshot in every epoch."""

    whole: Pass

    def get(self, _epoch: int) -> Pass:
        return self.whole

    def close(self) -> None:
        pass


class StopWaiting(Exception):
    """A stop was asked for while the rows of the next batch were still to come."""


@dataclass
class Memory:
    """Where a window lies: used again for the window after next."""

    data: Tensor
    """[rows, d_in] in the stored data type."""
    scale: Tensor
    """[rows] float32, int8's; empty otherwise."""
    free: Any = None
    """Passed when the last batch was gathered from it."""

    @classmethod
    def of(cls, rows: int, source: Rows, pinned: bool) -> "Memory":
        layout, spec = source.activations.layout, source.store.spec
        data = to_tensor(np.empty((rows, *layout.row_shape), layout.dtype), spec.dtype)
        scale = torch.empty(rows if spec.quantised else 0, dtype=torch.float32)
        return cls(data.pin_memory(), scale.pin_memory()) if pinned else cls(data, scale)

    def at(self, device: torch.device) -> "Memory":
        """As much on a device."""
        return Memory(torch.empty_like(self.data, device=device), torch.empty_like(self.scale, device=device))

    def stored(self) -> NDArray[Any]:
        """The host's memory as the store's bytes."""
        array: NDArray[Any] = (self.data.view(torch.uint16) if self.data.dtype == torch.bfloat16 else self.data).numpy()
        return array


@dataclass(frozen=True)
class Window:
    """Rows in memory, and the order in which they are given out."""

    memory: Memory
    order: Tensor
    """[rows] int64: places in the memory of the rows that are kept."""
    rows: int
    dims: Tensor
    """[units, d_in] float32, int8's scale of each dimension in each unit; empty otherwise."""
    unit_rows: int
    ready: Any
    """Passed when the copy to the device is complete."""

    def gather(self, start: int, stop: int, out: Float[Tensor, "rows d_in"]) -> None:
        """The window's rows start to stop, in the order in which they are given out."""
        if self.ready is not None:
            here = torch.cuda.current_stream(out.device)
            here.wait_event(self.ready)
            for tensor in (self.order, self.dims):  # of the copies' stream: not to be used anew before this is done
                tensor.record_stream(here)
        places = self.order[start:stop]
        if not len(self.dims):
            torch.index_select(self.memory.data, 0, places, out=out)
            return
        out.copy_(torch.index_select(self.memory.data, 0, places))
        out *= torch.index_select(self.memory.scale, 0, places)[:, None]
        out *= torch.index_select(self.dims, 0, places // self.unit_rows)


class Loader:
    """Reads windows, one after another for all streams, with one thread a core to decode their chunks. Only streams
    that have to wait for a harvest wait side by side."""

    def __init__(
        self, passes: Passes, streams: int, verify: Verify, device: torch.device, threads: int | None = None
    ) -> None:
        self.passes, self.verify, self.device = passes, verify, device
        self.threads = threads or len(os.sched_getaffinity(0))
        self.windows = ThreadPoolExecutor(streams, thread_name_prefix="window")
        self.one_at_a_time = threading.Lock()
        self.chunks = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        self.memories: dict[tuple[int, int], Memory] = {}
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def memory(self, key: tuple[int, int], rows: int, source: Rows) -> Memory:
        """The memory of this name, at least `rows` large."""
        held = self.memories.get(key)
        if held is None or len(held.data) < rows:
            del held
            self.memories.pop(key, None)  # before the larger one is there
            self.memories[key] = Memory.of(rows, source, pinned=self.copies is not None)
        return self.memories[key]

    def load(self, stream: int, epoch: int, window: int, turn: int) -> Window:
        """Reads and places one window. On a CPU it is decoded where it stays; on CUDA in one of two pinned buffers."""
        part = self.passes.get(epoch)
        units = [part.units[int(unit)] for unit in part.order.windows(epoch, stream)[window]]
        unit_rows = max(unit.count for unit in units) * part.rows.activations.layout.chunk_rows
        check = self.verify == "always" or (self.verify == "first-epoch" and epoch == 0)
        n = len(units) * unit_rows
        memory = self.memory((-1, turn) if self.copies else (stream, turn), n, part.rows)
        if memory.free is not None:
            memory.free.synchronize()
        rows, scale, holds = memory.stored(), memory.scale.numpy(), np.zeros(n, np.bool_)

        def read(first: int) -> None:
            """Every `tasks`-th unit: a task a chunk would cost a few percent."""
            for slot in range(first, len(units), tasks):
                at = slice(slot * unit_rows, (slot + 1) * unit_rows)
                read_unit(part, units[slot], rows[at], scale[at], holds[at], check)

        tasks = min(len(units), 4 * self.threads)
        for _ in self.chunks.map(read, range(tasks)):
            pass
        places = part.order.places(epoch, n, part.order.window_units * unit_rows)
        order = torch.from_numpy(places if holds.all() else places[holds[places]])
        dims = torch.empty(0)
        if part.rows.store.spec.quantised:
            scales = [part.rows.store.dim_scale(part.rows.hook, unit.shard) for unit in units]
            dims = torch.from_numpy(np.stack(scales))
        if self.copies is None:
            return Window(memory, order, len(order), dims, unit_rows, None)
        return self.to_device(memory, order, dims, unit_rows, (stream, turn), n)

    def to_device(
        self, host: Memory, order: Tensor, dims: Tensor, unit_rows: int, key: tuple[int, int], rows: int
    ) -> Window:
        """Copies a window on a stream of its own, behind the last gather from the memory that it goes to."""
        assert self.copies is not None
        there = self.memories.get(key)
        if there is None or len(there.data) < rows:
            del there
            self.memories.pop(key, None)
            there = self.memories[key] = host.at(self.device)
            self.copies.wait_stream(torch.cuda.current_stream(self.device))  # it may lie where a gather still reads
        with torch.cuda.stream(self.copies):
            if there.free is not None:
                self.copies.wait_event(there.free)
            there.data[:rows].copy_(host.data[:rows], non_blocking=True)
            there.scale[:rows].copy_(host.scale[:rows], non_blocking=True)
            window = Window(there, order.to(self.device), len(order), dims.to(self.device), unit_rows, new_event())
            assert window.ready is not None
            window.ready.record(self.copies)
        host.free = window.ready
        return window

    def close(self) -> None:
        self.passes.close()
        self.windows.shutdown(cancel_futures=True)
        self.chunks.shutdown()


def read_unit(
    part: Pass, unit: Run, rows: NDArray[Any], scale: NDArray[np.float32], holds: NDArray[np.bool_], check: bool
) -> None:
    """Decodes a unit into its part of a window, and marks the places that hold a row that is kept."""
    where = unit.shard, unit.first, unit.count
    start = unit.first * part.rows.activations.layout.chunk_rows
    n = len(part.rows.activations.read_run(*where, rows, check=check))
    if part.rows.row_scale is not None:
        part.rows.row_scale.read_run(*where, scale, check=check)
    holds[:n] = part.kept.marks(unit.shard, start, start + n)


def new_event() -> Any:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


class VirtualStream:
    """One of the V streams: its windows, one after another, epoch after epoch."""

    def __init__(self, loader: Loader, number: int, at: Position) -> None:
        self.loader, self.number, self.at, self.turn = loader, number, at, 0
        self.window: Window | None = None
        self.following = loader.windows.submit(self.load_from, at, self.turn)

    def load_from(self, at: Position, turn: int) -> tuple[Position, Window]:
        """The window at a position, or the next one that there is: a stream may have no part in a small pass."""
        epoch, window, offset = at.epoch, at.window, at.offset
        while window >= len(self.loader.passes.get(epoch).order.windows(epoch, self.number)):
            epoch, window, offset = epoch + 1, 0, 0
        with self.loader.one_at_a_time:
            return Position(epoch, window, offset), self.loader.load(self.number, epoch, window, turn)

    def enter(self, wait: Callable[[Future[Any]], Any]) -> Window:
        """The window that the stream stands in, waiting for it where it must."""
        if self.window is None:
            self.at, self.window = wait(self.following)
            self.turn ^= 1
            after = Position(self.at.epoch, self.at.window + 1)
            self.following = self.loader.windows.submit(self.load_from, after, self.turn)
        window: Window = self.window
        return window

    def leave(self) -> None:
        """Goes on to the next window. The memory of this one is written to again once its gathers are done."""
        if self.window is not None and self.window.ready is not None:
            self.window.memory.free = new_event()
            self.window.memory.free.record(torch.cuda.current_stream(self.loader.device))
        self.at, self.window = Position(self.at.epoch, self.at.window + 1), None

    def take(self, n: int, wait: Callable[[Future[Any]], Any]) -> Iterator[tuple[Window, int, int]]:
        """The next n rows, as parts of one or more windows. Raises UserError when there are none in two epochs."""
        last_epoch_with_rows = None
        while n:
            window = self.enter(wait)
            if last_epoch_with_rows is None or window.rows:
                last_epoch_with_rows = self.at.epoch
            if self.at.epoch - last_epoch_with_rows > 2:
                raise UserError("too few activations are left to train on. Harvest more tokens, or lower streams")
            start = self.at.offset
            stop = min(start + n, window.rows)
            self.at = Position(self.at.epoch, self.at.window, stop)
            n -= stop - start
            if stop > start:
                yield window, start, stop
            if stop == window.rows:
                self.leave()


class BatchStream:
    """Endless batches [rows, d_in] on the device: this rank's share of each global batch. Bfloat16 rows stay that,
    quantised ones become float32."""

    def __init__(
        self,
        loader: Loader,
        shares: Sequence[tuple[int, int, int]],
        rows_per_stream: int,
        positions: Sequence[Position],
        stop_asked: Callable[[], bool] = lambda: False,
    ) -> None:
        """`shares`: (stream, lo, hi), the part of a stream's piece that this rank gives out (train.order.share)."""
        self.loader, self.shares, self.rows_per_stream, self.stop_asked = loader, shares, rows_per_stream, stop_asked
        self.streams = {v: VirtualStream(loader, v, positions[v]) for v, _, _ in shares}
        self.rows = sum(hi - lo for _, lo, hi in shares)
        self.waited = 0.0
        """Seconds spent waiting for windows."""
        self.whole = self.stands()
        self.batch: Tensor | None = None

    def next_batch(self) -> Float[Tensor, "rows d_in"]:
        """Valid until the next call, which writes over it. Raises StopWaiting when a stop is asked for while the rows
        are still to come; the positions stay those before this batch."""
        filled = 0
        for number, lo, hi in self.shares:
            given = 0
            for window, start, stop in self.streams[number].take(self.rows_per_stream, self.wait):
                first, last = max(lo, given), min(hi, given + stop - start)
                if last > first:
                    out = self.memory(window)[filled : filled + last - first]
                    window.gather(start + first - given, start + last - given, out)
                    filled += last - first
                given += stop - start
        self.whole = self.stands()
        assert self.batch is not None
        return self.batch

    def memory(self, window: Window) -> Tensor:
        if self.batch is None:
            data = window.memory.data
            dtype = torch.float32 if len(window.dims) else data.dtype
            self.batch = torch.empty(self.rows, *data.shape[1:], dtype=dtype, device=data.device)
        return self.batch

    def wait(self, future: Future[Any]) -> Any:
        started = time.monotonic()
        try:
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

    def stands(self) -> dict[int, Position]:
        return {number: stream.at for number, stream in self.streams.items()}

    def positions(self) -> dict[int, Position]:
        """Where each of this rank's streams stands after the last whole batch: all that is needed to go on."""
        return self.whole

    def close(self) -> None:
        self.loader.close()
