"""Rows to a committed shard: permute, encode, write, sync, and last the manifest line.

Rows are permuted inside the shard before they are encoded. It costs one gather here and makes a window of a few
chunks nearly as well mixed as a shuffle of the whole corpus would (docs/store-format.md has the measurement). Any
number of processes may write one store, each the shards that it is given and each with a log of its own.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harvest.encode import ShardFiles
from shared.errors import UserError
from shared.files import Files
from shared.manifest import Commit, Sizes, append_commit
from shared.permute import SHARD_ROWS, permutation
from shared.spec import StoreSpec


@dataclass(frozen=True)
class ShardRows:
    """One hookpoint's activations of one shard, and their exact moments over the rows that count."""

    rows: NDArray[Any]
    """[n, d_in] in token order, as stored (bfloat16 as its bit pattern)."""
    norms: NDArray[np.float32]
    """[n] Euclidean norms, in token order."""
    total: NDArray[np.float64]
    """[d_in] sum."""
    squares: NDArray[np.float64]
    """[d_in] sum of squares."""


def rows_that_count(tokens: NDArray[Any], special_ids: tuple[int, ...]) -> NDArray[np.bool_]:
    """[contexts, context]: all but position 0 (an outlier in most models) and special tokens."""
    keep = ~np.isin(tokens, special_ids)
    keep[:, 0] = False
    return keep


class ShardWriter:
    """Commits shards one at a time in the background, so that the next one can be captured meanwhile.

    `submit` waits for the shard before, which bounds memory to two shards and raises that shard's error here. Inside a
    commit the hookpoints are written side by side and their chunks encoded on every core.
    """

    def __init__(
        self, files: Files, spec: StoreSpec, keep: NDArray[np.bool_], writer: int = 0, threads: int | None = None
    ) -> None:
        """`keep` [contexts, context] marks the rows that the moments are over; `writer` is this process's number."""
        self.files, self.spec, self.writer = files, spec, writer
        self.keep = keep.reshape(-1)
        self.committer = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self.hooks = ThreadPoolExecutor(len(spec.hookpoints), thread_name_prefix="hook")
        self.shards = ShardFiles(files, spec, threads)
        self.pending: Future[None] | None = None

    def submit(self, shard: int, rows: dict[str, ShardRows]) -> None:
        self.wait()
        self.pending = self.committer.submit(self.commit, shard, rows)

    def wait(self) -> None:
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def close(self) -> None:
        self.committer.shutdown()
        self.hooks.shutdown()
        self.shards.close()

    def commit(self, shard: int, rows: dict[str, ShardRows]) -> None:
        """Every file of the shard, then its manifest line."""
        start, stop = self.spec.shard_range(shard)
        order = permutation(stop - start, self.spec.seed, SHARD_ROWS, shard)
        stream = start + order
        kept = self.keep[stream]
        with self.files.explained():
            parts = [
                self.shards.vector("index/context", shard, (stream // self.spec.context).astype("<u4")),
                self.shards.vector("index/position", shard, (stream % self.spec.context).astype("<u2")),
                *self.hooks.map(lambda path: self.write_hookpoint(path, shard, rows[path], order, kept), rows),
            ]
            files = {path: entry for part in parts for path, entry in part.items()}
            append_commit(self.files, self.writer, Commit(shard, stop - start, start, stop, int(kept.sum()), files))

    def write_hookpoint(
        self, path: str, shard: int, part: ShardRows, order: NDArray[np.int64], kept: NDArray[np.bool_]
    ) -> Sizes:
        """One hookpoint's shard of activations, norms and sums; `order` permutes its rows."""
        check_finite(part, path, shard, self.spec)

        def fetch(at: slice, out: NDArray[Any]) -> None:
            np.take(part.rows, order[at], axis=0, out=out[: at.stop - at.start], mode="clip")

        return {
            **self.shards.activations(path, shard, len(order), fetch, part.squares, kept),
            **self.shards.vector(f"stats/{path}/norm", shard, part.norms[order]),
            **self.shards.row(f"stats/{path}/sum", shard, part.total),
            **self.shards.row(f"stats/{path}/sum_of_squares", shard, part.squares),
        }


def check_finite(part: ShardRows, path: str, shard: int, spec: StoreSpec) -> None:
    bad = np.flatnonzero(~np.isfinite(part.total + part.squares))
    if len(bad):
        start, stop = spec.shard_range(shard)
        raise UserError(
            f"{path}: NaN or infinite activations in {len(bad)} dimensions (first: {bad[0]}) of shard {shard}, tokens "
            f"{start:,} to {stop:,}. Try --dtype float32, or bfloat16 instead of float16"
        )
