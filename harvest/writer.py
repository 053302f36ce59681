"""Rows to a committed shard: permute, sum up, encode, write, sync, and last the manifest line.

Rows are permuted inside the shard before they are encoded. It costs one gather here and makes a window of a few
chunks nearly as well mixed as a shuffle of the whole corpus would (docs/store-format.md has the measurement).
"""

import errno
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import UserError
from shared.manifest import Commit, append_commit, write_file
from shared.permute import SHARD_ROWS, permutation
from shared.shard import as_float32, crc32c, encode_shard, with_crc
from shared.store import StoreSpec, shard_file

Rows = NDArray[Any]


def rows_that_count(tokens: Rows, special_ids: tuple[int, ...]) -> NDArray[np.bool_]:
    """[contexts, context]: all but position 0 (an outlier in most models) and special tokens."""
    keep = ~np.isin(tokens, special_ids)
    keep[:, 0] = False
    return keep


def shard_sums(rows: Rows, keep: NDArray[np.bool_], dtype: str, chunk_rows: int) -> tuple[Rows, Rows, Rows]:
    """Float64 sum and sum of squares [d_in] over the kept rows, and every row's norm [n] in float32."""
    total, squares = np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
    norms = np.empty(len(rows), "<f4")
    for start in range(0, len(rows), chunk_rows):
        part = slice(start, start + chunk_rows)
        x = as_float32(rows[part], dtype).astype("<f8")
        norms[part] = np.sqrt(np.einsum("nd,nd->n", x, x))
        x = x[keep[part]]
        total += x.sum(axis=0)
        squares += np.einsum("nd,nd->d", x, x)
    return total, squares, norms


class ShardWriter:
    """Commits shards one at a time on a background thread, so that the next one can be captured meanwhile.

    `submit` waits for the shard before, which bounds memory to two shards and raises that shard's error here.
    """

    def __init__(self, root: Path, spec: StoreSpec, tokens: Rows, threads: int) -> None:
        self.root, self.spec = root, spec
        self.keep = rows_that_count(tokens, spec.special_ids).reshape(-1)
        self.committer = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self.encoders = ThreadPoolExecutor(threads, thread_name_prefix="encode")
        self.pending: Future[Commit] | None = None

    def submit(self, shard: int, rows: dict[str, Rows]) -> None:
        self.wait()
        self.pending = self.committer.submit(self.commit, shard, rows)

    def wait(self) -> None:
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def close(self) -> None:
        self.committer.shutdown()
        self.encoders.shutdown()

    def commit(self, shard: int, rows: dict[str, Rows]) -> Commit:
        start, stop = self.spec.shard_range(shard)
        stream = start + permutation(stop - start, self.spec.seed, SHARD_ROWS, shard)
        keep = self.keep[stream]
        files: dict[str, tuple[int, int]] = {}
        with explained(self.root):
            self.write(files, shard, "index/context", (stream // self.spec.context).astype("<u4"))
            self.write(files, shard, "index/position", (stream % self.spec.context).astype("<u2"))
            for path, array in rows.items():
                permuted = array[stream - start]
                total, squares, norms = shard_sums(permuted, keep, self.spec.dtype, self.spec.chunk_rows)
                check_finite(total, squares, path, shard, start, stop)
                self.write(files, shard, path, permuted)
                self.write(files, shard, f"stats/{path}/norm", norms)
                self.write_bytes(files, shard, f"stats/{path}/sum", with_crc(total.tobytes()), 2)
                self.write_bytes(files, shard, f"stats/{path}/sum_of_squares", with_crc(squares.tobytes()), 2)
            commit = Commit(shard, stop - start, start, stop, int(keep.sum()), files)
            append_commit(self.root, 0, commit)
        return commit

    def write(self, files: dict[str, tuple[int, int]], shard: int, array: str, rows: Rows) -> None:
        data = encode_shard(rows, self.spec.layouts()[array], self.encoders.map)
        self.write_bytes(files, shard, array, data, rows.ndim)

    def write_bytes(self, files: dict[str, tuple[int, int]], shard: int, array: str, data: bytes, ndim: int) -> None:
        write_file(shard_file(self.root, array, shard, ndim), data)
        files[array] = (len(data), crc32c(data))


@contextmanager
def explained(root: Path) -> Iterator[None]:
    """Turns a full disk or a read-only one into a message; what is committed stays valid."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "the disk is full. Free space",
            errno.EDQUOT: "the disk quota is used up. Free space",
            errno.EROFS: "the file system is read-only. Make it writable",
            errno.EACCES: "permission denied. Make the folder writable",
        }
        if error.errno not in reasons:
            raise
        raise UserError(
            f"{root}: {reasons[error.errno]}, then run the same command again: committed shards are safe and stay"
        ) from error


def check_finite(total: Rows, squares: Rows, path: str, shard: int, start: int, stop: int) -> None:
    bad = np.flatnonzero(~np.isfinite(total + squares))
    if len(bad):
        raise UserError(
            f"{path}: NaN or infinite activations in {len(bad)} dimensions (first: {bad[0]}) of shard {shard}, tokens "
            f"{start:,} to {stop:,}. Try --dtype float32, or bfloat16 instead of float16"
        )
