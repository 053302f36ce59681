"""Windows of rows from a store's committed shards to batches on the device.

While one window of a stream is used, its next one is read by threads in the background: decoded where it will lie,
then (on CUDA) copied to the device, so that memory is two windows and what is being decoded. Rows are gathered, and
int8 rows turned into numbers, on the device, batch by batch. A stream resumes from a position by reading that window
again.
"""

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, runtime_checkable

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
    unit_rows: int
    """Of a whole unit."""
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
    """Where windows lie: two for every stream, used in turn."""

    data: Tensor
    """[places, d_in] in the stored data type."""
    scale: Tensor
    """[places] float32, int8's for each row; empty otherwise."""
    dims: Tensor
    """[places / rows of a unit, d_in] float32, int8's for each dimension in a unit; empty otherwise."""

    @classmethod
    def of(cls, units: int, unit_rows: int, source: Rows, device: torch.device, pinned: bool = False) -> "Memory":
        """Untouched memory of the host costs nothing yet."""
        layout, spec = source.activations.layout, source.store.spec
        rows, scaled = units * unit_rows, spec.quantised
        if device.type == "cpu":
            data = to_tensor(np.empty((rows, *layout.row_shape), layout.dtype), spec.dtype)
        else:
            data = torch.empty(rows, *layout.row_shape, dtype=DEVICE_TYPES[layout.dtype.name], device=device)
        scale = torch.empty(rows if scaled else 0, dtype=torch.float32, device=device)
        dims = torch.empty(units if scaled else 0, *layout.row_shape, dtype=torch.float32, device=device)
        found = cls(data, scale, dims)
        return cls(data.pin_memory(), scale.pin_memory(), dims.pin_memory()) if pinned else found

    def part(self, first_unit: int, units: int, unit_rows: int) -> "Memory":
        rows = slice(first_unit * unit_rows, (first_unit + units) * unit_rows)
        return Memory(self.data[rows], self.scale[rows], self.dims[first_unit : first_unit + units])

    def copy_(self, other: "Memory") -> None:
        self.data.copy_(other.data, non_blocking=True)
        self.scale.copy_(other.scale, non_blocking=True)
        self.dims.copy_(other.dims, non_blocking=True)

    def batch(self, rows: int) -> Float[Tensor, "rows d_in"]:
        """Memory for so many rows as numbers."""
        dtype = torch.float32 if len(self.dims) else self.data.dtype
        return torch.empty(rows, *self.data.shape[1:], dtype=dtype, device=self.data.device)

    def gather(self, places: Tensor, unit_rows: int, out: Float[Tensor, "rows d_in"]) -> None:
        """The rows at these places, as numbers."""
        if not len(self.dims):
            torch.index_select(self.data, 0, places, out=out)
            return
        out.copy_(torch.index_select(self.data, 0, places))
        out *= torch.index_select(self.scale, 0, places)[:, None]
        out *= torch.index_select(self.dims, 0, places // unit_rows)


DEVICE_TYPES: Final = {
    "uint16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": torch.int8,
}


@dataclass(frozen=True)
class Window:
    """Rows in memory, in the order in which they are given out."""

    order: Tensor
    """[rows] int32: places in the memory of the rows that are kept."""
    rows: int
    ready: Any
    """Passed when the copy to the device is complete."""


class Loader:
    """Reads windows, one after another for all streams, with one thread a core to decode their chunks. Only streams
    that have to wait for a harvest wait side by side."""

    def __init__(
        self, passes: Passes, streams: int, verify: Verify, device: torch.device, threads: int | None = None
    ) -> None:
        self.passes, self.streams, self.verify, self.device = passes, streams, verify, device
        self.threads = threads or len(os.sched_getaffinity(0))
        self.windows = ThreadPoolExecutor(streams, thread_name_prefix="window")
        self.one_at_a_time = threading.Lock()
        self.chunks = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.memory: Memory | None = None
        self.staging: list[Memory] = []
        self.staged: list[Any] = [None, None]
        """Passed when what lies in a staging buffer is on the device."""
        self.free: dict[tuple[int, int], Any] = {}
        """Passed when the last batch was gathered from a stream's window: by stream and turn."""
        self.unit_rows = self.full = 0

    def prepare(self, part: Pass) -> Memory:
        """Memory for two windows of every stream, and on CUDA two pinned windows on the host."""
        if self.memory is None:
            units = part.order.window_units
            if isinstance(self.passes, Same):  # a small store fills no whole window
                units = min(units, -(-part.order.n_units // part.order.streams))
            self.unit_rows, self.full = part.unit_rows, units
            self.memory = Memory.of(2 * self.streams * units, self.unit_rows, part.rows, self.device)
            if self.copies is not None:
                host = torch.device("cpu")
                self.staging = [Memory.of(units, self.unit_rows, part.rows, host, pinned=True) for _ in range(2)]
        return self.memory

    def load(self, stream: int, epoch: int, window: int, turn: int) -> Window:
        """Reads and places one window. On a CPU it is decoded where it stays; on CUDA in one of two pinned buffers."""
        part = self.passes.get(epoch)
        units = [part.units[int(unit)] for unit in part.order.windows(epoch, stream)[window]]
        check = self.verify == "always" or (self.verify == "first-epoch" and epoch == 0)
        memory = self.prepare(part)
        first = (2 * stream + turn) * self.full
        there = memory.part(first, len(units), self.unit_rows)
        host = there if self.copies is None else self.staging[turn].part(0, len(units), self.unit_rows)
        if self.staged[turn] is not None:
            self.staged[turn].synchronize()
        holds = self.read_units(part, units, host, check)
        places = part.order.places(epoch, len(holds), part.order.window_units * self.unit_rows)
        kept = (places if holds.all() else places[holds[places]]) + np.int32(first * self.unit_rows)
        order = torch.from_numpy(kept)
        if self.copies is None:
            return Window(order, len(order), None)
        return self.to_device(host, there, order, (stream, turn))

    def read_units(self, part: Pass, units: list[Run], memory: Memory, check: bool) -> NDArray[np.bool_]:
        """Decodes units into a window's memory. Gives which places hold a row that is kept."""
        data, n = memory.data, self.unit_rows
        rows = (data.view(torch.uint16) if data.dtype == torch.bfloat16 else data).numpy()
        scale, dims, holds = memory.scale.numpy(), memory.dims.numpy(), np.zeros(len(data), np.bool_)
        tasks = min(len(units), 4 * self.threads)

        def read(first: int) -> None:
            """Every `tasks`-th unit: a task a chunk would cost a few percent."""
            for slot in range(first, len(units), tasks):
                at = slice(slot * n, (slot + 1) * n)
                read_unit(part, units[slot], rows[at], scale[at], holds[at], check)
                if part.rows.row_scale is not None:
                    dims[slot] = part.rows.dim_scale(units[slot].shard)

        for _ in self.chunks.map(read, range(tasks)):
            pass
        return holds

    def to_device(self, host: Memory, there: Memory, order: Tensor, key: tuple[int, int]) -> Window:
        """Copies a window on a stream of its own, behind the last gather from the memory that it goes to."""
        assert self.copies is not None
        with torch.cuda.stream(self.copies):
            if key in self.free:
                self.copies.wait_event(self.free[key])
            there.copy_(host)
            window = Window(order.to(self.device), len(order), new_event())
            window.ready.record(self.copies)
        self.staged[key[1]] = window.ready
        return window

    def await_copy(self, window: Window) -> None:
        """What is asked of the device from now on comes after the window's copy."""
        if window.ready is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(window.ready)
            window.order.record_stream(here)  # it was made on the copies' stream

    def release(self, key: tuple[int, int]) -> None:
        """All gathers from a stream's memory of this turn have been asked of the device."""
        if self.copies is not None:
            self.free[key] = new_event()
            self.free[key].record(torch.cuda.current_stream(self.device))

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
    """One of the V streams: its windows, one after another, epoch after epoch.

    Rows are gathered after several streams have said where theirs are. Until then no window may be read into the memory
    that they lie in: the next one is read ahead when `read_ahead` says that the gathers are done.
    """

    def __init__(self, loader: Loader, number: int, at: Position) -> None:
        self.loader, self.number, self.at, self.turn = loader, number, at, 0
        self.offset, self.last_epoch = at.offset, at.epoch
        self.window: Window | None = None
        self.following: Future[Any] | None = loader.windows.submit(self.load_from, at, self.turn)

    def load_from(self, at: Position, turn: int) -> tuple[Position, Window]:
        """The window at a position, or the next one that there is: a stream may have no part in a small pass."""
        epoch, window, offset = at.epoch, at.window, at.offset
        while window >= len(self.loader.passes.get(epoch).order.windows(epoch, self.number)):
            epoch, window, offset = epoch + 1, 0, 0
        with self.loader.one_at_a_time:
            return Position(epoch, window, offset), self.loader.load(self.number, epoch, window, turn)

    def enter(self, wait: Callable[[Future[Any]], Any]) -> Window | None:
        """The window that the stream stands in, waiting for it where it must; None when `read_ahead` has to come first.
        Raises UserError when two epochs had nothing to give."""
        while self.window is None and self.following is not None:
            self.at, found = wait(self.following)
            self.following = None
            self.turn ^= 1
            if self.at.offset < found.rows:
                self.window, self.offset, self.last_epoch = found, self.at.offset, self.at.epoch
                self.loader.await_copy(found)
            elif self.at.epoch - self.last_epoch > 2:
                raise UserError("too few activations are left to train on. Harvest more tokens, or lower streams")
            else:
                self.at, self.offset = Position(self.at.epoch, self.at.window + 1), 0
        return self.window

    def advance(self, stop: int) -> None:
        """The window's rows up to `stop` are taken."""
        self.offset = stop
        assert self.window is not None
        if stop == self.window.rows:
            self.at, self.window, self.offset = Position(self.at.epoch, self.at.window + 1), None, 0

    def read_ahead(self) -> None:
        """All rows that were taken are gathered: the memory of the window before this one is free."""
        if self.following is None:
            after = self.at if self.window is None else Position(self.at.epoch, self.at.window + 1)
            self.loader.release((self.number, self.turn))
            self.following = self.loader.windows.submit(self.load_from, after, self.turn)

    def stands(self) -> Position:
        """The next row to give out."""
        return Position(self.at.epoch, self.at.window, self.offset)


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
        return {number: stream.stands() for number, stream in self.streams.items()}

    def positions(self) -> dict[int, Position]:
        """Where each of this rank's streams stands after the last whole batch: all that is needed to go on."""
        return self.whole

    def close(self) -> None:
        self.loader.close()
