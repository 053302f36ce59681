"""The rows of one hookpoint, with their places in the corpus, the int8 scales and the mask of rows that are kept."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np
import torch
from jaxtyping import Shaped
from numpy.typing import NDArray
from torch import Tensor

from shared.store.opened import Store
from shared.store.quantise import dequantise
from shared.store.reader import Reader, open_reader, read_places, read_shard
from shared.store.tokens import flat
from train.data.order import ChunkRuns, runs_of
from train.data.row_mask import RowMask


@dataclass(frozen=True)
class HookRows:
    """The activations of one hookpoint, and the context and position in the corpus that each row came from."""

    store: Store
    hook: str
    activations: Reader
    contexts: Reader
    positions: Reader
    row_scale: Reader | None
    """The int8 scale of each row; None for other codecs."""
    dim_scale: Callable[[int], NDArray[np.float32]]
    """Returns the int8 scales [d_in] of a shard's dimensions."""

    @classmethod
    def of(cls, store: Store, hook: str) -> "HookRows":
        """Opens the arrays of a hookpoint."""
        scale = open_reader(store, f"scale/{hook}/row") if store.spec.quantised else None
        activations, contexts, positions = (open_reader(store, a) for a in (hook, "index/context", "index/position"))
        dim_scale = lru_cache(maxsize=4096)(partial(store.dim_scale, hook))
        return cls(store, hook, activations, contexts, positions, scale, dim_scale)

    def units(self, run_chunks: int) -> ChunkRuns:
        """Returns the units of reading that a `ReadOrder` permutes."""
        commits = self.store.commits
        return runs_of(commits.shards, commits.rows, self.activations.layout.chunk_rows, run_chunks)

    def values(self, shard: int, chunk: int) -> NDArray[np.generic]:
        """Returns the rows of a chunk [rows, d_in]: as stored, or float32 where they were quantised."""
        rows = self.activations.read(shard, chunk)
        if self.row_scale is None:
            return rows
        return dequantise(rows, self.row_scale.read(shard, chunk), self.dim_scale(shard))


def norms_and_places(
    rows: HookRows, keep: NDArray[np.bool_] | RowMask
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Returns, for the committed rows marked in `keep` [contexts, context], in stored order: their norms as harvested,
    and their places in the token stream (context * context length + position)."""
    marked, spec = KeptRows(rows, keep), rows.store.spec
    norms = open_reader(rows.store, f"stats/{rows.hook}/norm")
    lengths, places = [np.empty(0, np.float32)], [np.empty(0, np.int64)]
    shards = RowMask.of(keep).shards(spec.shard_rows, spec.n_tokens)
    for shard in [shard for shard in shards if shard in rows.store.commits]:
        start, stop = spec.shard_range(shard)
        marks = marked.marks(shard, 0, stop - start)
        lengths.append(read_shard(norms, shard)[marks])
        places.append(start + read_places(rows.contexts, rows.positions, shard)[marks])
    return np.concatenate(lengths), np.concatenate(places)


def to_tensor(rows: NDArray[np.generic], dtype: str) -> Shaped[Tensor, "rows d_in"]:
    """Returns stored rows as a tensor of the store's data type, without a copy. Dequantised rows stay float32."""
    tensor = torch.from_numpy(rows)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" and rows.dtype == np.uint16 else tensor


@dataclass
class KeptRows:
    """The rows of a store's shards that are marked in a mask over the corpus. A row with NaN or infinities never is.

    A shard's marks are worked out from the index arrays on first use and then kept, one bit per row.
    """

    rows: HookRows
    mask: NDArray[np.bool_] | RowMask
    """[contexts, context]"""
    shards: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    """The marks of each shard seen so far, eight rows per byte."""

    def bits(self, shard: int) -> NDArray[np.uint8]:
        """Returns a shard's marks, eight rows per byte."""
        if shard not in self.shards:
            start, stop = self.rows.store.spec.shard_range(shard)
            places = read_places(self.rows.contexts, self.rows.positions, shard)
            marked = np.take(flat(self.mask)[start:stop], places)
            if self.rows.hook in self.rows.store.commits[shard].nonfinite:
                marked &= np.isfinite(read_shard(open_reader(self.rows.store, f"stats/{self.rows.hook}/norm"), shard))
            self.shards[shard] = np.packbits(marked)
        return self.shards[shard]

    def marks(self, shard: int, start: int, stop: int) -> NDArray[np.bool_]:
        """Returns which of a shard's rows `start` to `stop` are marked."""
        first = start // 8
        bits = np.unpackbits(self.bits(shard)[first : -(-stop // 8)])
        return bits[start - 8 * first : stop - 8 * first].view(np.bool_)

    def values(self, shard: int, chunk: int) -> NDArray[np.generic]:
        """Returns the marked rows of a chunk, in the type that `HookRows.values` returns."""
        rows = self.rows.values(shard, chunk)
        start = chunk * self.rows.activations.layout.chunk_rows
        return rows[self.marks(shard, start, start + len(rows))]
