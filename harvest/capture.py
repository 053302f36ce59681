"""One shard's worth of activations: token rows through the model, every hookpoint in one forward.

What a batch holds depends on the shard alone, never on where an interrupted harvest took up again, so the numbers
of a shard are the same in both cases (matrix products of other shapes may round differently). The moments are taken
where the activations are, on the model's device, in float64, of the values as they will be stored.

On CUDA all that is done with activations happens on a stream of its own: the model computes the next batch meanwhile.
"""

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harvest.writer import Ready, ShardRows
from shared.device import torch_dtype
from shared.errors import UserError
from shared.model import LanguageModel
from shared.spec import StoreSpec

BITS: Final = {torch.bfloat16: torch.uint16}
"""Stored data type where numpy has none: the bit pattern."""
BLOCK_BYTES: Final = {"cpu": 1 << 19, "cuda": 1 << 28}
"""Float64 at a time in the moments: what fits into a core's cache, or keeps a GPU busy."""
BATCHES_AHEAD: Final = 2
"""That a GPU may be behind what was asked of it: each holds its activations until they are on the host."""


@dataclass(frozen=True)
class Memory:
    """Host memory for one hookpoint of one shard, pinned where the model is on CUDA."""

    rows: Tensor
    """[shard rows, d_in] in the stored data type."""
    norms: Tensor
    """[shard rows] float32."""
    moments: Tensor
    """[2, d_in] float64: sum and sum of squares."""

    def result(self, n: int) -> ShardRows:
        rows = self.rows[:n].view(BITS.get(self.rows.dtype, self.rows.dtype)).numpy()
        total, squares = self.moments.numpy().copy()
        return ShardRows(rows, self.norms[:n].numpy(), total, squares)


Slot = dict[str, Memory]
"""Memory for one whole shard of every hookpoint."""


def make_slot(spec: StoreSpec, device: torch.device) -> Slot:
    """Raises UserError when the host has not enough memory."""
    rows, pin = min(spec.shard_rows, spec.n_tokens), device.type == "cuda"
    try:
        return {
            path: Memory(
                torch.empty(rows, hook.d_in, dtype=torch_dtype(spec.dtype), pin_memory=pin),
                torch.empty(rows, dtype=torch.float32, pin_memory=pin),
                torch.empty(2, hook.d_in, dtype=torch.float64, pin_memory=pin),
            )
            for path, hook in spec.hookpoints.items()
        }
    except (RuntimeError, MemoryError) as error:
        raise UserError(
            f"there is no memory for a shard of {rows:,} rows of {len(spec.hookpoints)} hookpoints. Harvest fewer "
            "hookpoints at a time, or start afresh with smaller shards: --set shard_rows=N"
        ) from error


@dataclass
class HookSink:
    """Takes one hookpoint's activations, batch after batch, and keeps the rows that belong to the shard."""

    memory: Memory
    n: int
    """Rows of the shard."""
    keep: Tensor
    """[n] bool on the model's device: the rows that count in the moments."""
    side: Any = None
    """The CUDA stream that copies and counts; None: where the model runs."""
    begin: int = 0
    """Where in the shard the current batch starts; negative when its first rows belong to the shard before."""
    calls: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        device = self.keep.device
        with on(self.side):
            self.norms = torch.empty(self.n, dtype=torch.float32, device=device)
            self.moments = torch.zeros(2, self.memory.rows.shape[1], dtype=torch.float64, device=device)

    def push(self, activations: Tensor) -> None:
        first, last = max(0, -self.begin), min(len(activations), self.n - self.begin)
        target = slice(self.begin + first, self.begin + last)
        # A copy of its own for the side stream: the model may go on to change what it computed in place.
        stored = activations[first:last].to(self.memory.rows.dtype, copy=self.side is not None)
        if self.side is not None:
            self.side.wait_stream(torch.cuda.current_stream(stored.device))
            stored.record_stream(self.side)
        with on(self.side):
            self.memory.rows[target].copy_(stored, non_blocking=True)
            self.add_moments(stored, self.keep[target], self.norms[target])
        self.calls += 1

    def add_moments(self, stored: Tensor, keep: Tensor, norms: Tensor) -> None:
        """Sums over the rows that count. A row with a NaN or an infinity does not."""
        rows = max(1, BLOCK_BYTES[stored.device.type] // (8 * stored.shape[1]))
        parts = zip(*(torch.split(tensor, rows) for tensor in (stored, keep, norms)), strict=True)
        for x, counts, out in parts:
            x = x.double()
            squares = x.square()
            out.copy_(squares.sum(1).sqrt_())
            counted = (counts & out.isfinite())[:, None]
            self.moments[0] += torch.where(counted, x, 0).sum(0)
            self.moments[1] += torch.where(counted, squares, 0).sum(0)

    def finish(self) -> None:
        """The last batch was pushed: what was counted goes to the host too."""
        with on(self.side):
            self.memory.norms[: self.n].copy_(self.norms, non_blocking=True)
            self.memory.moments.copy_(self.moments, non_blocking=True)


def on(stream: Any) -> AbstractContextManager[Any]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


class Capture:
    """Runs a model over the shards of one store."""

    def __init__(
        self, model: LanguageModel, spec: StoreSpec, tokens: NDArray[Any], keep: NDArray[np.bool_], batch_contexts: int
    ) -> None:
        """`tokens` and `keep` (which rows count in the moments) are [contexts, context]."""
        self.model, self.spec, self.tokens, self.batch = model, spec, tokens, batch_contexts
        self.keep = keep.reshape(-1)
        cuda = model.device.type == "cuda"
        self.side = torch.cuda.Stream(model.device) if cuda else None  # type: ignore[no-untyped-call]

    def shard(self, shard: int, slot: Slot, after_batch: Callable[[int], None]) -> Ready:
        """Captures a shard into a slot. Gives a function that waits until all of it is there and gives the rows, in
        token order. `after_batch(n)` is told of every n rows and may raise to stop. Raises RuntimeError when a hook did
        not fire exactly once a batch."""
        start, stop = self.spec.shard_range(shard)
        keep = torch.from_numpy(self.keep[start:stop]).to(self.model.device)
        sinks = {path: HookSink(slot[path], stop - start, keep, self.side) for path in self.spec.hookpoints}
        names = {self.spec.hookpoints[path].name: sink.push for path, sink in sinks.items()}
        context, last, batches = self.spec.context, -(-stop // self.spec.context), 0
        asked: deque[Any] = deque()
        widths = {hook.name: hook.d_in for hook in self.spec.hookpoints.values()}
        with self.model.capturing(names, widths) as run:
            for first in range(start // context, last, self.batch):
                batch = self.tokens[first : min(first + self.batch, last)]
                for sink in sinks.values():
                    sink.begin = first * context - start
                run(torch.from_numpy(batch.astype("int64")))
                batches += 1
                asked.append(self.event())
                if len(asked) > BATCHES_AHEAD:
                    asked.popleft()()
                begin = first * context
                after_batch(min(begin + batch.size, stop) - max(begin, start))
        for path, sink in sinks.items():
            if sink.calls != batches:
                raise RuntimeError(f"{path}: its hook fired {sink.calls} times in {batches} forward passes")
            sink.finish()
        complete = self.event()

        def result() -> dict[str, ShardRows]:
            complete()
            return {path: slot[path].result(stop - start) for path in sinks}

        return result

    def event(self) -> Callable[[], None]:
        """A function that waits until the device has done what it was asked so far."""
        if self.side is None:
            return lambda: None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self.side)
        return event.synchronize
