"""Rows to a committed shard: permute, sum up, encode, write, sync, and last the manifest line.

Rows are permuted inside the shard before they are encoded. It costs one gather here and makes a window of a few
chunks nearly as well mixed as a shuffle of the whole corpus would (docs/store-format.md has the measurement).
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import UserError
from shared.manifest import Commit, append_commit, explained, write_file
from shared.permute import SHARD_ROWS, permutation
from shared.shard import Layout, as_float32, assemble_shard, crc32c, encode_chunk, encode_shard, pad_chunk, with_crc
from shared.store import StoreSpec, shard_file

Rows = NDArray[Any]
Files = dict[str, tuple[int, int]]
"""Length and crc32c of each file written, by array."""


def rows_that_count(tokens: Rows, special_ids: tuple[int, ...]) -> NDArray[np.bool_]:
    """[contexts, context]: all but position 0 (an outlier in most models) and special tokens."""
    keep = ~np.isin(tokens, special_ids)
    keep[:, 0] = False
    return keep


@dataclass(frozen=True)
class Chunk:
    """One inner chunk of a hookpoint, encoded, and what it adds to the statistics."""

    data: bytes
    total: Rows
    """Float64 sum over the kept rows [d_in]."""
    squares: Rows
    norms: Rows
    """Of every row, float32."""


def make_chunk(rows: Rows, order: Rows, keep: NDArray[np.bool_], layout: Layout, dtype: str) -> Chunk:
    """Gathers `rows[order]`, sums it up and encodes it: 2 MiB at a time, so that it all happens in the cache."""
    part = rows[order]
    x = as_float32(part, dtype).astype("<f8")
    norms = np.sqrt(np.einsum("nd,nd->n", x, x)).astype("<f4")
    x = x[keep]
    data = encode_chunk(pad_chunk(part, layout), layout.codec)
    return Chunk(data, x.sum(axis=0), np.einsum("nd,nd->d", x, x), norms)


class ShardWriter:
    """Commits shards one at a time in the background, so that the next one can be captured meanwhile.

    `submit` waits for the shard before, which bounds memory to two shards and raises that shard's error here. Inside a
    commit the hookpoints are written side by side and their chunks encoded on every core.
    """

    def __init__(self, root: Path, spec: StoreSpec, tokens: Rows) -> None:
        self.root, self.spec, self.layouts = root, spec, spec.layouts()
        self.keep = rows_that_count(tokens, spec.special_ids).reshape(-1)
        self.committer = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self.hooks = ThreadPoolExecutor(len(spec.hookpoints), thread_name_prefix="hook")
        self.encoders = ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="encode")
        self.pending: Future[None] | None = None

    def submit(self, shard: int, rows: dict[str, Rows]) -> None:
        self.wait()
        self.pending = self.committer.submit(self.commit, shard, rows)

    def wait(self) -> None:
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def close(self) -> None:
        for pool in (self.committer, self.hooks, self.encoders):
            pool.shutdown()

    def commit(self, shard: int, rows: dict[str, Rows]) -> None:
        """Every file of the shard, then its manifest line."""
        start, stop = self.spec.shard_range(shard)
        order = permutation(stop - start, self.spec.seed, SHARD_ROWS, shard)
        stream = start + order
        with explained(self.root):
            parts = [
                self.write_vector("index/context", shard, (stream // self.spec.context).astype("<u4")),
                self.write_vector("index/position", shard, (stream % self.spec.context).astype("<u2")),
                *self.hooks.map(lambda path: self.write_hookpoint(path, shard, rows[path], order), rows),
            ]
            files = {path: entry for part in parts for path, entry in part.items()}
            append_commit(self.root, 0, Commit(shard, stop - start, start, stop, int(self.keep[stream].sum()), files))

    def write_hookpoint(self, path: str, shard: int, rows: Rows, order: Rows) -> Files:
        """One hookpoint's shard of activations, norms and sums; `rows` are in token order, `order` permutes them."""
        start, stop = self.spec.shard_range(shard)
        layout = self.layouts[path]
        kept = self.keep[start + order]

        def chunk(at: int) -> Chunk:
            part = slice(at, at + layout.chunk_rows)
            return make_chunk(rows, order[part], kept[part], layout, self.spec.dtype)

        chunks = list(self.encoders.map(chunk, range(0, stop - start, layout.chunk_rows)))
        total, squares = (np.sum([getattr(c, name) for c in chunks], axis=0) for name in ("total", "squares"))
        check_finite(total, squares, path, shard, start, stop)
        return {
            **self.write(path, shard, assemble_shard([c.data for c in chunks], layout), 2),
            **self.write_vector(f"stats/{path}/norm", shard, np.concatenate([c.norms for c in chunks])),
            **self.write(f"stats/{path}/sum", shard, with_crc(total.tobytes()), 2),
            **self.write(f"stats/{path}/sum_of_squares", shard, with_crc(squares.tobytes()), 2),
        }

    def write_vector(self, array: str, shard: int, rows: Rows) -> Files:
        return self.write(array, shard, encode_shard(rows, self.layouts[array]), 1)

    def write(self, array: str, shard: int, data: bytes, ndim: int) -> Files:
        write_file(shard_file(self.root, array, shard, ndim), data)
        return {array: (len(data), crc32c(data))}


def check_finite(total: Rows, squares: Rows, path: str, shard: int, start: int, stop: int) -> None:
    bad = np.flatnonzero(~np.isfinite(total + squares))
    if len(bad):
        raise UserError(
            f"{path}: NaN or infinite activations in {len(bad)} dimensions (first: {bad[0]}) of shard {shard}, tokens "
            f"{start:,} to {stop:,}. Try --dtype float32, or bfloat16 instead of float16"
        )
