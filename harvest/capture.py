"""Captures the activations of one shard: token rows go through the model, and every hookpoint is read in one forward
pass.

What a batch holds depends on the shard alone, never on where an interrupted harvest resumed. The numbers of a shard are
therefore the same in both cases (matrix products of other shapes may round differently). Moments are computed from the
values as they will be stored (harvest/moments.py).

On CUDA all work on activations runs on a side stream, while the model computes the next batch.

On a CPU several batches are computed side by side, each by a thread with its own cores. These threads never wait for
each other: neither at the end of a shard, nor for a core that the writer shares with one of them. The moments are
computed when the shard is complete, by the thread that asks for its rows.
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harvest import background
from harvest.moments import MomentsPart, add_moments_on_device, moments_on_host
from harvest.writer import Ready, ShardRows
from shared.device import sent, torch_dtype
from shared.errors import UserError
from shared.model.language_model import LanguageModel
from shared.store.spec import StoreSpec
from shared.store.tokens import TokenMask, TokenRows, flat

BITS: Final = {torch.bfloat16: torch.uint16}
"""The integer data type that holds the bit pattern of a stored type which numpy does not have."""
BATCHES_AHEAD: Final = 2
"""Maximum batches queued on the GPU. Each keeps its activations in GPU memory until they are on the host."""


@dataclass(frozen=True)
class ShardMemory:
    """Host memory for one hookpoint of one shard, pinned where the model is on CUDA."""

    rows: Tensor
    """[shard rows, d_in] in the stored data type."""
    norms: Tensor
    """[shard rows] float32."""
    moments: Tensor
    """[2, d_in] float64: sum and sum of squares."""

    def stored(self, n: int) -> NDArray[Any]:
        """Returns the first n rows as a numpy array."""
        return self.rows[:n].view(BITS.get(self.rows.dtype, self.rows.dtype)).numpy()

    def result(self, n: int) -> ShardRows:
        total, squares = self.moments.numpy().copy()
        return ShardRows(self.stored(n), self.norms[:n].numpy(), total, squares)


Slot = dict[str, ShardMemory]
"""Memory for one whole shard of every hookpoint, by hookpoint path."""


def make_slot(spec: StoreSpec, device: torch.device) -> Slot:
    """Allocates a slot. Raises UserError when the host has too little memory."""
    rows, pin = min(spec.shard_rows, spec.n_tokens), device.type == "cuda"
    try:
        return {
            path: ShardMemory(
                torch.empty(rows, hook.d_in, dtype=torch_dtype(spec.dtype), pin_memory=pin),
                torch.empty(rows, dtype=torch.float32, pin_memory=pin),
                torch.empty(2, hook.d_in, dtype=torch.float64, pin_memory=pin),
            )
            for path, hook in spec.hookpoints.items()
        }
    except (RuntimeError, MemoryError) as error:
        raise UserError(
            f"the host has too little memory for {rows:,} rows of {len(spec.hookpoints)} hookpoints. Harvest fewer "
            "hookpoints at a time, or start again with smaller shards: --set shard_rows=N"
        ) from error


@dataclass
class HookSink:
    """Takes one hookpoint's activations, batch by batch, and keeps the rows that belong to the shard."""

    memory: ShardMemory
    n: int
    """Rows of the shard."""
    keep: Tensor
    """[n] bool on the model's device: the rows that count in the moments."""
    side: Any = None
    """The CUDA stream that copies and counts; None: the stream of the model."""

    def __post_init__(self) -> None:
        if self.side is not None:
            with torch.cuda.stream(self.side):
                self.norms = torch.empty(self.n, dtype=torch.float32, device=self.keep.device)
                self.moments = torch.zeros_like(self.memory.moments, device=self.keep.device)

    def push(self, first_row: int, activations: Tensor) -> None:
        """Takes a batch [rows, d_in]. `first_row` is its place in the shard; it is negative when the batch begins with
        rows of the previous shard."""
        first, last = max(0, -first_row), min(len(activations), self.n - first_row)
        target = slice(first_row + first, first_row + last)
        if self.side is None:
            self.memory.rows[target].copy_(activations[first:last])
            return
        # The side stream needs its own copy, because the model may change its result in place.
        stored = activations[first:last].to(self.memory.rows.dtype, copy=True)
        self.side.wait_stream(torch.cuda.current_stream(stored.device))
        stored.record_stream(self.side)
        with torch.cuda.stream(self.side):
            self.memory.rows[target].copy_(stored, non_blocking=True)
            add_moments_on_device(stored, self.keep[target], self.norms[target], self.moments)

    def finish(self) -> None:
        """Called after the last batch. On CUDA it copies norms and moments to the host too."""
        if self.side is not None:
            with torch.cuda.stream(self.side):
                self.memory.norms[: self.n].copy_(self.norms, non_blocking=True)
                self.memory.moments.copy_(self.moments, non_blocking=True)


def model_threads(count: int, cores: int) -> ThreadPoolExecutor:
    """A pool of `count` threads, each with `cores` cores for its matrix products."""

    def use_own_cores() -> None:
        torch.set_num_threads(cores)
        torch.get_num_threads()  # otherwise this thread's first product would read the global number again
        started.wait()

    here, started = torch.get_num_threads(), threading.Barrier(count + 1)
    pool = ThreadPoolExecutor(count, thread_name_prefix="model", initializer=use_own_cores)
    for _ in range(count):
        pool.submit(lambda: None)
    started.wait()
    torch.set_num_threads(here)  # the pool's threads keep their own number; this one is for later threads
    return pool


class Capture:
    """Runs a model over the shards of one store."""

    def __init__(
        self,
        models: Sequence[LanguageModel],
        spec: StoreSpec,
        tokens: NDArray[Any] | TokenRows,
        keep: NDArray[np.bool_] | TokenMask,
        batch_contexts: int,
        threads: int,
    ) -> None:
        """`tokens` and `keep` (which rows count in the moments) are [contexts, context]. On a CPU several models
        compute side by side and share `threads`."""
        self.model, self.spec, self.tokens, self.batch = models[0], spec, tokens, batch_contexts
        self.keep = flat(keep)
        self.pool = background.pool(threads, "moments")
        self.free: SimpleQueue[LanguageModel] = SimpleQueue()
        """Models that no thread is using."""
        for model in models:
            self.free.put(model)
        self.streams = model_threads(len(models), max(1, threads // len(models))) if len(models) > 1 else None
        self.ahead = len(models) - 1
        """Batches that may still be running when those of the next shard begin."""
        self.running: deque[tuple[Future[None], int]] = deque()
        """Batches that are running, each with the number of its rows in the shard."""
        device = self.model.device
        cuda = device.type == "cuda"
        if cuda and device.index is not None:
            torch.cuda.set_device(device)  # otherwise later calls would also allocate on the first GPU
        self.side = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Waits for running batches and drops the queued ones."""
        if self.streams is not None:
            self.streams.shutdown(cancel_futures=True)
        self.pool.shutdown()

    def finish(self, after_batch: Callable[[int], None], left: int = 0) -> None:
        """Waits until no more than `left` batches are running."""
        while len(self.running) > left:
            batch, rows = self.running.popleft()
            batch.result()
            after_batch(rows)

    def shard(self, shard: int, slot: Slot, after_batch: Callable[[int], None]) -> Ready:
        """Captures a shard into a slot. Returns a function that waits until the shard is complete and returns its rows,
        in token order. `after_batch(n)` is called with the number of rows of each batch and may raise to stop. Raises
        UserError when a hook did not return a row for every token."""
        start, stop = self.spec.shard_range(shard)
        n = stop - start
        keep = sent(torch.from_numpy(self.keep[start:stop]), self.model.device)
        sinks = {path: HookSink(slot[path], n, keep, self.side) for path in self.spec.hookpoints}
        context, last = self.spec.context, -(-stop // self.spec.context)
        queued: deque[Any] = deque()
        batches: list[Future[None]] = []
        for first in range(start // context, last, self.batch):
            batch = self.tokens[first : min(first + self.batch, last)]
            begin = first * context
            rows = min(begin + batch.size, stop) - max(begin, start)
            if self.streams is None:
                self.compute(batch, sinks, begin - start)
                queued.append(self.done_event())
                if len(queued) > BATCHES_AHEAD:
                    queued.popleft()()
                after_batch(rows)
            else:
                batches.append(self.streams.submit(self.compute, batch, sinks, begin - start))
                self.running.append((batches[-1], rows))
        self.finish(after_batch, self.ahead)
        for sink in sinks.values():
            sink.finish()
        complete = self.done_event()

        def result() -> dict[str, ShardRows]:
            complete()
            for batch in batches:
                batch.result()
            if self.side is None:
                kept = self.keep[start:stop]
                parts = [MomentsPart(memory.stored(n), kept, memory.norms[:n].numpy()) for memory in slot.values()]
                for memory, total in zip(slot.values(), moments_on_host(self.pool, parts), strict=True):
                    memory.moments.copy_(torch.from_numpy(total))
            return {path: slot[path].result(n) for path in sinks}

        return result

    def compute(self, tokens: NDArray[Any], sinks: Mapping[str, HookSink], first_row: int) -> None:
        """Runs one batch, whose first row is row `first_row` of the shard."""
        hooks = self.spec.hookpoints
        model = self.free.get()
        try:
            names = {hooks[path].name: partial(sink.push, first_row) for path, sink in sinks.items()}
            with model.capturing(names, {hook.name: hook.d_in for hook in hooks.values()}) as run:
                run(torch.from_numpy(tokens.astype("int64")))
        finally:
            self.free.put(model)

    def done_event(self) -> Callable[[], None]:
        """Returns a function that waits until the device has finished the work queued so far."""
        if self.side is None:
            return lambda: None
        event, device = torch.cuda.Event(blocking=True), self.side.device  # type: ignore[no-untyped-call]
        event.record(self.side)

        def wait() -> None:  # also called in the writer's thread, whose current device is the first GPU
            with torch.cuda.device(device):
                event.synchronize()

        return wait
