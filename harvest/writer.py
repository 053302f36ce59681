"""Commits a shard: permutes, encodes, writes and syncs its rows, then appends the manifest line.

Rows are permuted inside the shard before they are encoded. This costs one gather, and makes a window of a few chunks
nearly as well mixed as a shuffle of the whole corpus (docs/reference/store-format.md has the measurement). Any number
of processes may write one store, each with its own shards and its own log in the manifest.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from harvest import background
from harvest.encode import ShardFiles
from shared.errors import UserError
from shared.files.base import Files, Write
from shared.permute import SHARD_ROWS, permutation
from shared.store.manifest import Commit, Sizes, append_commit
from shared.store.spec import StoreSpec
from shared.store.tokens import TokenMask, flat

LATEST: Final = 16


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


Ready = Callable[[], dict[str, ShardRows]]
"""Waits until a shard's rows are in memory, and returns them by hookpoint path."""


class ShardWriter:
    """Commits shards in the background, one at a time and in order, so that the next one can be captured meanwhile.

    Inside a commit, hookpoints are written side by side and their chunks are encoded on every core. The caller hands
    out the memory of the rows, and so limits how many shards wait.
    """

    def __init__(
        self,
        files: Files,
        spec: StoreSpec,
        keep: NDArray[np.bool_] | TokenMask,
        *,
        writer: int = 0,
        threads: int | None = None,
        allow_nonfinite: bool = False,
    ) -> None:
        """`keep` [contexts, context] marks the rows that the moments are over; `writer` is the number of this
        process."""
        self.files, self.spec, self.writer, self.allow_nonfinite = files, spec, writer, allow_nonfinite
        self.keep = flat(keep)
        self.committer = background.pool(1, "commit")
        self.hooks = background.pool(len(spec.hookpoints), "hook")
        self.shards = ShardFiles(spec, threads)
        self.pending: deque[Future[None]] = deque()
        self.failed = False
        self.commits: deque[Commit] = deque(maxlen=LATEST)
        """The latest commits of this writer."""

    def submit(self, shard: int, rows: Ready, done: Callable[[], None] = lambda: None) -> None:
        """Commits a shard in the background: waits for its rows there, and calls `done` when they are written. After a
        commit that failed, no other begins."""

        def run() -> None:
            if self.failed:
                return
            try:
                self.commit(shard, rows())
            except BaseException:
                self.failed = True
                raise
            done()

        self.pending.append(self.committer.submit(run))

    def check(self) -> None:
        """Raises the error of a commit that failed."""
        while self.pending and self.pending[0].done():
            self.pending.popleft().result()

    def wait(self) -> None:
        while self.pending:
            self.pending.popleft().result()

    def close(self) -> None:
        """Waits for the running commit and drops the queued ones."""
        self.committer.shutdown(cancel_futures=True)
        self.hooks.shutdown()
        self.shards.close()

    def commit(self, shard: int, rows: dict[str, ShardRows]) -> None:
        """Writes every file of the shard, then its manifest line. Raises UserError for NaN and infinities unless they
        are allowed. If they are, the line counts the rows with one among those that count in the moments."""
        start, stop = self.spec.shard_range(shard)
        order = permutation(stop - start, self.spec.seed, SHARD_ROWS, shard)
        stream = start + order
        counts = self.keep[start:stop]
        kept = counts[order]
        nonfinite = {}
        for path, part in rows.items():
            bad = ~np.isfinite(part.norms)
            if bad.any() and not self.allow_nonfinite:
                raise not_finite(path, np.flatnonzero(bad) + start, self.spec)
            if bad.any():
                nonfinite[path] = int((bad & counts).sum())
        with self.files.explained():
            with self.files.together() as write:
                hooks = [
                    self.hooks.submit(self.write_hookpoint, write, path, shard, part, order, kept)
                    for path, part in rows.items()
                ]
                try:
                    files = self.write_index(write, shard, stream)
                finally:
                    wait(hooks)  # no thread still writes when the failure of one deletes the files
                for hook in hooks:
                    files |= hook.result()
            commit = Commit(shard, stop - start, start, stop, int(kept.sum()), files, nonfinite)
            append_commit(self.files, self.writer, commit)
        self.commits.append(commit)

    def write_index(self, write: Write, shard: int, stream: NDArray[np.int64]) -> Sizes:
        """Writes where the shard's rows came from. `stream` [n] holds their row numbers in the token stream."""
        context, position = np.divmod(stream, self.spec.context)
        return {
            **self.shards.write_vector(write, "index/context", shard, context.astype("<u4")),
            **self.shards.write_vector(write, "index/position", shard, position.astype("<u2")),
        }

    def write_hookpoint(
        self, write: Write, path: str, shard: int, part: ShardRows, order: NDArray[np.int64], kept: NDArray[np.bool_]
    ) -> Sizes:
        """Writes one hookpoint's activations, norms and sums for a shard; `order` permutes its rows."""

        def fetch(at: slice, out: NDArray[Any]) -> None:
            np.take(part.rows, order[at], axis=0, out=out[: at.stop - at.start], mode="clip")

        return {
            **self.shards.write_activations(write, path, shard, len(order), fetch, part.squares, kept),
            **self.shards.write_vector(write, f"stats/{path}/norm", shard, part.norms[order]),
            **self.shards.write_row(write, f"stats/{path}/sum", shard, part.total),
            **self.shards.write_row(write, f"stats/{path}/sum_of_squares", shard, part.squares),
        }


def not_finite(path: str, rows: NDArray[np.int64], spec: StoreSpec) -> UserError:
    """The error for NaN or infinities. `rows` are their sorted row numbers in the token stream."""
    context, position = divmod(int(rows[0]), spec.context)
    return UserError(
        f"{path}: NaN or infinite activations in {len(rows):,} rows, the first of them row {rows[0]:,} (context "
        f"{context}, position {position}). float16 ends at 65,504: use --dtype bfloat16 or float32, and --set "
        f"store_dtype=bfloat16. To keep such rows, marked and left out of statistics and training: --allow-nonfinite"
    )
