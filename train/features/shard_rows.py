"""Reads the rows of a shard that count, in the order of the token stream.

A shard holds neighbouring tokens, permuted. Back in their order, the code of one shard is complete for every context
in it, so that windows of text come from the same pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from numpy.typing import NDArray
from torch import Tensor

from shared.store.opened import Store
from shared.store.reader import read_places
from shared.store.tokens import TokenRows
from train.data.norm_filter import FilteredRows
from train.data.order import SplitSettings, usable_rows
from train.data.row_mask import RowMask
from train.data.rows import HookRows, KeptRows, to_tensor


@dataclass(frozen=True)
class OrderedRows:
    """The rows of one shard that count, in the order of the token stream."""

    start: int
    """The place of the shard's first token in the token stream (context * context length + position)."""
    stop: int
    """The place behind its last token."""
    places: NDArray[np.int64]
    """The place of each row, rising."""
    values: Shaped[Tensor, "rows d_in"]
    """The activations in their stored type; float32 where they were quantised."""
    end: int
    """The place behind the last token of the store."""
    first: int
    """The place of `ids[0]`, which begins a context."""
    ids: NDArray[Any]
    """The token ids of every context that the shard touches."""

    def on(self, device: torch.device) -> "OrderedRows":
        """Returns the same with the activations on a device."""
        return replace(self, values=self.values.to(device))


@dataclass(frozen=True)
class RowSource:
    """The rows of a hookpoint that the pass reads."""

    rows: HookRows
    kept: KeptRows
    mask: RowMask
    tokens: TokenRows

    @classmethod
    def of(
        cls, store: Store, hook: str, trained: SplitSettings, left: FilteredRows | None, tokens: int | None
    ) -> "RowSource":
        """The rows that a run trains and measures on, but those in `left`; with `tokens`, only those of the first whole
        contexts that hold so many tokens. Reads all token ids. Raises DamagedError when they were altered."""
        ids = store.token_rows(check=False)
        contexts = contexts_within(store, tokens)
        mask = RowMask.packed(ids.shape, usable_blocks(ids, trained, contexts))
        mask = mask if left is None else mask.without(left.everywhere)
        rows = HookRows.of(store, hook)
        return cls(rows, KeptRows(rows, mask), mask, ids)

    @cached_property
    def shards(self) -> list[int]:
        """The committed shards that hold a row that counts, in the order of the token stream."""
        spec, commits = self.rows.store.spec, self.rows.store.commits
        return [shard for shard in self.mask.shards(spec.shard_rows, spec.n_tokens) if shard in commits]

    def count(self) -> int:
        """Returns how many rows count, among them rows with NaN, which the pass leaves out."""
        ranges = map(self.rows.store.spec.shard_range, self.shards)
        return sum(self.mask.count(start, stop) for start, stop in ranges)

    def read(self, shard: int) -> OrderedRows:
        """Reads and decodes one shard. Raises DamagedError when its bytes are not what was committed."""
        spec, size = self.rows.store.spec, self.rows.activations.layout.chunk_rows
        start, stop = spec.shard_range(shard)
        inside = read_places(self.rows.contexts, self.rows.positions, shard)
        marks = self.kept.marks(shard, 0, stop - start)
        counts = np.zeros(stop - start, np.bool_)
        counts[inside[marks]] = True
        targets = np.cumsum(counts)[inside] - 1
        values: Tensor | None = None
        for chunk, at in enumerate(range(0, stop - start, size)):
            part = to_tensor(self.rows.values(shard, chunk), spec.dtype)
            if values is None:
                values = torch.empty(int(counts.sum()), part.shape[1], dtype=part.dtype)
            some = np.flatnonzero(marks[at : at + len(part)])
            part = part if len(some) == len(part) else part[torch.from_numpy(some)]
            values.index_copy_(0, torch.from_numpy(targets[at + some]), part)
        assert values is not None
        first = start // spec.context
        ids = self.tokens[first : -(-stop // spec.context)].reshape(-1)
        return OrderedRows(
            start, stop, start + np.flatnonzero(counts), values, spec.n_tokens, first * spec.context, ids
        )


def contexts_within(store: Store, tokens: int | None) -> int:
    """Returns the number of contexts, from the beginning of the store, whose committed tokens are at most `tokens` (at
    least one context); all contexts without a limit."""
    spec = store.spec
    if tokens is None:
        return spec.n_contexts
    left = max(tokens, spec.context)
    for shard in sorted(store.commits):
        start, stop = spec.shard_range(shard)
        if left < stop - start:
            return max(1, (start + left) // spec.context)
        left -= stop - start
    return spec.n_contexts


def usable_blocks(ids: TokenRows, trained: SplitSettings, contexts: int) -> Iterator[NDArray[np.bool_]]:
    """Yields the mask of the rows that count, block by block; none from context `contexts` on."""
    at = 0
    for block in ids.blocks():
        usable = usable_rows(ids.spec, block, trained)
        usable[max(0, contexts - at) :] = False
        at += len(block)
        yield usable
