"""One shard's worth of activations: token rows through the model, every hookpoint in one forward.

What a batch holds depends on the shard alone, never on where an interrupted harvest took up again, so the numbers
of a shard are the same in both cases (matrix products of other shapes may round differently). The moments are taken
where the activations are, on the model's device, in float64, of the values as they will be stored.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harvest.writer import ShardRows
from shared.device import torch_dtype
from shared.model import LanguageModel
from shared.spec import StoreSpec

BITS: Final = {torch.bfloat16: torch.uint16}
"""Stored data type where numpy has none: the bit pattern."""
BLOCK_BYTES: Final = {"cpu": 1 << 19, "cuda": 1 << 28}
"""Float64 at a time in the moments: what fits into a core's cache, or keeps a GPU busy."""


@dataclass
class HookSink:
    """Takes one hookpoint's activations, batch after batch, and keeps the rows that belong to the shard."""

    rows: Tensor
    """[shard rows, d_in] on the host (pinned where the model is on CUDA), in the stored data type."""
    keep: Tensor
    """[shard rows] float64 on the model's device: one for the rows that count in the moments, else zero."""
    begin: int = 0
    """Where in `rows` the current batch starts; negative when its first rows belong to the shard before."""
    calls: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        n, d_in = self.rows.shape
        device = self.keep.device
        self.norms = torch.empty(n, dtype=torch.float32, device=device)
        self.moments = torch.zeros(2, d_in, dtype=torch.float64, device=device)

    def push(self, activations: Tensor) -> None:
        first, last = max(0, -self.begin), min(len(activations), len(self.rows) - self.begin)
        target = slice(self.begin + first, self.begin + last)
        stored = activations[first:last].to(self.rows.dtype)
        self.rows[target].copy_(stored, non_blocking=True)
        self.add_moments(stored, self.keep[target], self.norms[target])
        self.calls += 1

    def add_moments(self, stored: Tensor, keep: Tensor, norms: Tensor) -> None:
        """Sums over the rows with keep = 1. A NaN or an infinity in a row that does not count does not spoil them."""
        rows = max(1, BLOCK_BYTES[stored.device.type] // (8 * stored.shape[1]))
        parts = zip(*(torch.split(tensor, rows) for tensor in (stored, keep, norms)), strict=True)
        for x, counts, out in parts:
            x = x.double()
            squares = x.square()
            out.copy_(squares.sum(1).sqrt_())
            counted = counts[:, None] > 0
            self.moments[0] += torch.where(counted, x, 0).sum(0)
            self.moments[1] += torch.where(counted, squares, 0).sum(0)

    def result(self) -> ShardRows:
        total, squares = self.moments.cpu().numpy()
        rows = self.rows.view(BITS.get(self.rows.dtype, self.rows.dtype)).numpy()
        return ShardRows(rows, self.norms.cpu().numpy(), total, squares)


def make_buffers(spec: StoreSpec, device: torch.device) -> dict[str, Tensor]:
    """Host memory for one whole shard of every hookpoint."""
    rows = min(spec.shard_rows, spec.n_tokens)
    return {
        path: torch.empty(rows, hook.d_in, dtype=torch_dtype(spec.dtype), pin_memory=device.type == "cuda")
        for path, hook in spec.hookpoints.items()
    }


def capture_shard(
    model: LanguageModel,
    spec: StoreSpec,
    tokens: NDArray[Any],
    keep: NDArray[np.bool_],
    shard: int,
    buffers: dict[str, Tensor],
    batch_contexts: int,
    after_batch: Callable[[int], None],
) -> dict[str, ShardRows]:
    """Hookpoint path -> the shard's rows in token order (in `buffers`) and their moments over the rows marked in
    `keep` [contexts, context]. `after_batch(n)` is told of every n rows and may raise to stop. Raises RuntimeError
    when a hook did not fire exactly once a batch."""
    start, stop = spec.shard_range(shard)
    counts = torch.from_numpy(keep.reshape(-1)[start:stop]).to(model.device).double()
    sinks = {path: HookSink(buffers[path][: stop - start], counts) for path in spec.hookpoints}
    names = {spec.hookpoints[path].name: sink.push for path, sink in sinks.items()}
    batches = 0
    with model.capturing(names, {hook.name: hook.d_in for hook in spec.hookpoints.values()}) as run:
        for context in range(start // spec.context, -(-stop // spec.context), batch_contexts):
            batch = tokens[context : min(context + batch_contexts, -(-stop // spec.context))]
            for sink in sinks.values():
                sink.begin = context * spec.context - start
            run(torch.from_numpy(batch.astype("int64")))
            batches += 1
            begin = context * spec.context
            after_batch(min(begin + batch.size, stop) - max(begin, start))
    for path, sink in sinks.items():
        if sink.calls != batches:
            raise RuntimeError(f"{path}: its hook fired {sink.calls} times in {batches} forward passes")
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return {path: sink.result() for path, sink in sinks.items()}
