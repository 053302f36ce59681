"""Background threads read windows of rows from a store's committed shards into memory.

On a CPU a window is decoded in place. On CUDA it is decoded into a pinned host buffer and copied to the device. Memory
holds two windows of every stream that this process reads, allocated once, plus what is being decoded. The window that
training needs first is read first. On CUDA, reading is paced to training (train/data/read_ahead.py); on a CPU, reading
and training share the cores.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from shared.device import local_cores, sent
from train.data.order import ChunkRun, ReadOrder
from train.data.read_ahead import ReadAhead
from train.data.rows import HookRows, KeptRows, to_tensor

Verify = Literal["always", "first-epoch", "off"]


@dataclass(frozen=True)
class StorePass:
    """One pass over some committed shards."""

    rows: HookRows
    kept: KeptRows
    units: Sequence[ChunkRun]
    unit_rows: int
    """Rows in a full unit of reading."""
    order: ReadOrder


@runtime_checkable
class PassSource(Protocol):
    """Supplies the pass that is read in each epoch."""

    def open(self) -> None:
        """Allows `get` to wait, also after an earlier `close`."""
        ...

    def get(self, epoch: int) -> StorePass:
        """Returns the pass of an epoch. May wait for a running harvest."""
        ...

    def close(self) -> None:
        """Ends any wait in `get`."""
        ...


@dataclass(frozen=True)
class FixedSnapshot:
    """Reads the same snapshot in every epoch."""

    whole: StorePass

    def open(self) -> None:
        pass

    def get(self, _epoch: int) -> StorePass:
        return self.whole

    def close(self) -> None:
        pass


@dataclass
class WindowMemory:
    """The memory that windows are read into: two windows per stream, used alternately."""

    data: Tensor
    """[places, d_in] in the stored data type."""
    scale: Tensor
    """[places] float32: the int8 scale of each row; empty for other codecs."""
    dims: Tensor
    """[places / rows per unit, d_in] float32: the int8 scale of each dimension in each unit; empty for other codecs."""

    @classmethod
    def of(
        cls, units: int, unit_rows: int, source: HookRows, device: torch.device, pinned: bool = False
    ) -> "WindowMemory":
        """Allocates memory for `units` units. Host memory costs nothing until it is first written."""
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

    def part(self, first_unit: int, units: int, unit_rows: int) -> "WindowMemory":
        """A view of `units` units from `first_unit` on."""
        rows = slice(first_unit * unit_rows, (first_unit + units) * unit_rows)
        return WindowMemory(self.data[rows], self.scale[rows], self.dims[first_unit : first_unit + units])

    def copy_(self, other: "WindowMemory") -> None:
        self.data.copy_(other.data, non_blocking=True)
        self.scale.copy_(other.scale, non_blocking=True)
        self.dims.copy_(other.dims, non_blocking=True)

    def batch(self, rows: int) -> Float[Tensor, "rows d_in"]:
        """Allocates a batch [rows, d_in]: float32 for int8 rows, else the stored type. On a CPU numpy allocates it,
        because numpy asks for large pages."""
        dtype, shape = torch.float32 if len(self.dims) else self.data.dtype, (rows, *self.data.shape[1:])
        if self.data.device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=self.data.device)
        size = dtype.itemsize * rows * self.data.shape[1:].numel()
        return torch.from_numpy(np.empty(size, np.uint8)).view(dtype).view(shape)

    def gather(self, places: Tensor, unit_rows: int, out: Float[Tensor, "rows d_in"]) -> None:
        """Copies the rows at `places` to `out` and applies int8 scales."""
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
    """The rows of one window in memory, in the order in which they go into batches."""

    order: Tensor
    """[rows] int32: the places in memory of the rows that are kept."""
    rows: int
    ready: Any
    """A CUDA event that is recorded after the copy to the device; None on a CPU."""


class Loader:
    """Reads one window at a time, for all streams, with a pool of threads that decode its chunks. A second pool has one
    thread per stream, which waits for the harvest or for its turn to read."""

    def __init__(
        self,
        passes: PassSource,
        streams: Sequence[int],
        verify: Verify,
        device: torch.device,
        threads: int | None = None,
        paced: bool | None = None,
    ) -> None:
        """`streams`: the streams that this process reads. `threads`: how many threads decode. `paced`: whether reading
        is paced to training; by default on CUDA only."""
        self.passes, self.verify, self.device = passes, verify, device
        self.slots = {stream: slot for slot, stream in enumerate(streams)}
        """The slot in memory of each stream's two windows."""
        passes.open()
        cuda = device.type == "cuda"
        self.paced = cuda if paced is None else paced
        self.pace = ReadAhead()
        self.threads = threads or decoding_threads(local_cores(), self.paced)
        initializer = None
        if cuda:  # a new thread would use the first GPU
            index = torch.cuda.current_device() if device.index is None else device.index
            initializer = partial(torch.cuda.set_device, index)
        self.window_pool = ThreadPoolExecutor(len(self.slots), thread_name_prefix="window", initializer=initializer)
        self.decode_pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        self.copies = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]
        self.memory: WindowMemory | None = None
        self.staging: list[WindowMemory] = []
        self.staged: list[Any] = [None, None]
        """For each staging buffer, the CUDA event recorded after its last copy to the device."""
        self.free: dict[tuple[int, int], Any] = {}
        """By stream and turn, the CUDA event recorded after the last batch was gathered from that window."""
        self.unit_rows = self.full = 0

    def prepare(self, part: StorePass) -> WindowMemory:
        """Allocates, on first use, two windows per stream, and on CUDA two pinned staging buffers on the host."""
        if self.memory is None:
            units = part.order.longest if isinstance(self.passes, FixedSnapshot) else part.order.window_units
            self.unit_rows, self.full = part.unit_rows, units
            if self.paced:
                self.pace.limit(len(self.slots) * units * self.unit_rows)
            self.memory = WindowMemory.of(2 * len(self.slots) * units, self.unit_rows, part.rows, self.device)
            if self.copies is not None:
                host = torch.device("cpu")
                self.staging = [WindowMemory.of(units, self.unit_rows, part.rows, host, pinned=True) for _ in range(2)]
        return self.memory

    def load(self, stream: int, epoch: int, window: int, turn: int, needed: int) -> Window:
        """Waits for the window's turn, then reads it and returns it. `turn` (0 or 1) chooses which of the stream's two
        windows is written. `needed` is how many rows the stream gives out before it needs this window. Raises
        CancelledError when the loader is closed meanwhile."""
        part = self.passes.get(epoch)
        with self.pace.turn((needed, stream)):
            return self.load_now(part, stream, epoch, window, turn)

    def load_now(self, part: StorePass, stream: int, epoch: int, window: int, turn: int) -> Window:
        """Decodes one window, works out the order of its rows and, on CUDA, starts the copy to the device."""
        units = [part.units[int(unit)] for unit in part.order.windows(epoch, stream)[window]]
        check = self.verify == "always" or (self.verify == "first-epoch" and epoch == 0)
        memory = self.prepare(part)
        first = (2 * self.slots[stream] + turn) * self.full
        target = memory.part(first, len(units), self.unit_rows)
        host = target if self.copies is None else self.staging[turn].part(0, len(units), self.unit_rows)
        if self.staged[turn] is not None:
            self.staged[turn].synchronize()
        holds = self.read_units(part, units, host, check)
        places = part.order.places(epoch, len(holds), part.order.window_units * self.unit_rows)
        kept = (places if holds.all() else places[holds[places]]) + np.int32(first * self.unit_rows)
        order = torch.from_numpy(kept)
        self.pace.add(len(order))
        if self.copies is None:
            return Window(order, len(order), None)
        return self.to_device(host, target, order, (stream, turn))

    def read_units(
        self, part: StorePass, units: list[ChunkRun], memory: WindowMemory, check: bool
    ) -> NDArray[np.bool_]:
        """Decodes units into a window's memory. Returns a mask [places] of those that hold a row that is kept."""
        data, n = memory.data, self.unit_rows
        rows = (data.view(torch.uint16) if data.dtype == torch.bfloat16 else data).numpy()
        scale, dims, holds = memory.scale.numpy(), memory.dims.numpy(), np.zeros(len(data), np.bool_)

        def read(slots: Iterator[int]) -> None:
            """Decodes units until none is left. One task per unit would cost a few percent."""
            for slot in slots:
                if self.pace.closed:
                    raise CancelledError
                span = slice(slot * n, (slot + 1) * n)
                read_unit(part, units[slot], rows[span], scale[span], holds[span], check)
                if part.rows.row_scale is not None:
                    dims[slot] = part.rows.dim_scale(units[slot].shard)

        done, count = 0, len(units)
        while done < count:
            more = -(-self.pace.wait_for_rows(done * n, (count - done) * n) // n)
            slots = iter(range(done, done + more))
            for _ in self.decode_pool.map(read, [slots] * min(more, self.threads)):
                pass
            done += more
        return holds

    def to_device(self, host: WindowMemory, target: WindowMemory, order: Tensor, key: tuple[int, int]) -> Window:
        """Starts the copy of a window on a separate CUDA stream, after the last gather from the memory that it
        overwrites. Does not wait: the next window is decoded meanwhile."""
        assert self.copies is not None
        with torch.cuda.stream(self.copies):
            if key in self.free:
                self.copies.wait_event(self.free[key])
            target.copy_(host)
            window = Window(sent(order, self.device), len(order), new_event())
            window.ready.record(self.copies)
        self.staged[key[1]] = window.ready
        return window

    def await_copy(self, window: Window) -> None:
        """Makes all later work on the current CUDA stream wait for the window's copy."""
        if window.ready is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(window.ready)
            window.order.record_stream(current)  # it was allocated on the copy stream

    def release(self, key: tuple[int, int]) -> None:
        """Marks a window's memory as free once all gathers queued so far are done. `key`: stream and turn."""
        if self.copies is not None:
            self.free[key] = new_event()
            self.free[key].record(torch.cuda.current_stream(self.device))

    def close(self) -> None:
        self.passes.close()
        self.pace.close()
        self.window_pool.shutdown(cancel_futures=True)
        self.decode_pool.shutdown()
        if self.copies is not None:
            self.copies.synchronize()  # before the memory that the copies use is freed


def decoding_threads(cores: int, paced: bool) -> int:
    """One thread per core. With paced reading, one core is left to the thread that launches the GPU's kernels, and at
    most eight threads (or half the cores) decode: eight read as fast as sixteen (docs/records/benchmarks.md)."""
    return max(1, min(8, cores - 1), cores // 2) if paced else cores


def read_unit(
    part: StorePass,
    unit: ChunkRun,
    rows: NDArray[Any],
    scale: NDArray[np.float32],
    holds: NDArray[np.bool_],
    check: bool,
) -> None:
    """Decodes a unit into its part of a window (`rows`, `scale`) and marks in `holds` the places of rows that are kept.
    `check`: verify each chunk's checksum."""
    where = unit.shard, unit.first, unit.count
    start = unit.first * part.rows.activations.layout.chunk_rows
    n = len(part.rows.activations.read_run(*where, rows, check=check))
    if part.rows.row_scale is not None:
        part.rows.row_scale.read_run(*where, scale, check=check)
    holds[:n] = part.kept.marks(unit.shard, start, start + n)


def new_event() -> Any:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
