"""One shard's worth of activations: token rows through the model, every hookpoint in one forward.

What a batch holds depends on the shard alone, never on where an interrupted harvest took up again, so the numbers
of a shard are the same in both cases (matrix products of other shapes may round differently).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.model import LanguageModel, torch_dtype
from shared.store import StoreSpec

BITS: Final = {torch.bfloat16: torch.uint16}
"""Stored data type where numpy has none: the bit pattern."""


@dataclass
class HookSink:
    """Takes one hookpoint's activations, batch after batch, and keeps the rows that belong to the shard."""

    rows: Tensor
    """[shard rows, d_in] on the host (pinned where the model is on CUDA), in the stored data type."""
    begin: int = 0
    """Where in `rows` the current batch starts; negative when its first rows belong to the shard before."""
    calls: int = field(default=0, init=False)

    def push(self, activations: Tensor) -> None:
        first, last = max(0, -self.begin), min(len(activations), len(self.rows) - self.begin)
        target = self.rows[self.begin + first : self.begin + last]
        target.copy_(activations[first:last].to(target.dtype), non_blocking=True)
        self.calls += 1

    def array(self) -> NDArray[Any]:
        """The rows as numpy sees them, without a copy."""
        return self.rows.view(BITS.get(self.rows.dtype, self.rows.dtype)).numpy()


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
    shard: int,
    buffers: dict[str, Tensor],
    batch_contexts: int,
    after_batch: Callable[[int], None],
) -> dict[str, NDArray[Any]]:
    """Hookpoint path -> [rows of the shard, d_in] in token order, in `buffers`. `after_batch(n)` is told of every n
    rows and may raise to stop. Raises RuntimeError when a hook did not fire exactly once a batch."""
    start, stop = spec.shard_range(shard)
    sinks = {path: HookSink(buffers[path][: stop - start]) for path in spec.hookpoints}
    names = {spec.hookpoints[path].name: sink.push for path, sink in sinks.items()}
    batches = 0
    with model.capturing(names) as run:
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
    return {path: sink.array() for path, sink in sinks.items()}
