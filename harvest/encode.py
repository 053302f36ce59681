"""Encodes the files of one shard: chunks are encoded on every core and written in order, counted and checksummed.

Memory is a few chunks, whatever the size of the shard.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from harvest import background
from shared.device import usable_cores
from shared.files.base import Write
from shared.files.handles import Buffer
from shared.store.manifest import Sizes
from shared.store.quantise import dequantise, dim_scale, quantise
from shared.store.shard import as_float32, crc32, encode_chunk, encode_shard, pad_chunk, shard_pieces, with_crc
from shared.store.spec import DTYPES, StoreSpec, shard_file

Item = TypeVar("Item")
Result = TypeVar("Result")
Fetch = Callable[[slice, NDArray[Any]], None]
"""Copies the rows of a slice of the shard, in stored order, to the beginning of a chunk's memory."""


class ShardFiles:
    """Writes the files of shards; safe to call from any number of threads. `close` ends its encoding threads."""

    def __init__(self, spec: StoreSpec, threads: int | None = None) -> None:
        self.spec, self.layouts = spec, spec.layouts()
        self.threads = threads or usable_cores()
        self.pool = background.pool(self.threads, "encode")
        self.local = threading.local()

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)

    def write_activations(
        self,
        write: Write,
        hook: str,
        shard: int,
        n: int,
        fetch: Fetch,
        squares: NDArray[np.float64],
        kept: NDArray[np.bool_],
    ) -> Sizes:
        """Writes a hookpoint's n rows through the store's codec. `squares` [d_in] is the sum of squares over the rows
        `kept` [n], in stored order. int8 derives its scales from it and measures its error over these rows."""
        layout = self.layouts[hook]
        slices = [slice(at, min(at + layout.chunk_rows, n)) for at in range(0, n, layout.chunk_rows)]
        if self.spec.quantised:
            return self.write_int8(write, hook, shard, slices, fetch, dim_scale(squares, int(kept.sum())), kept)

        def encode(at: slice) -> bytes:
            chunk = self.chunk_memory(layout.chunk_shape, layout.dtype)
            fetch(at, chunk)
            chunk[at.stop - at.start :] = layout.fill
            return encode_chunk(chunk, layout.codec)

        return self.write_file(write, hook, shard, shard_pieces(self.in_order(encode, slices), layout), True)

    def write_int8(
        self,
        write: Write,
        hook: str,
        shard: int,
        slices: list[slice],
        fetch: Fetch,
        dim: NDArray[np.float32],
        kept: NDArray[np.bool_],
    ) -> Sizes:
        """Writes quantised rows, their scales, and the squared error in each dimension."""
        layout, dtype = self.layouts[hook], DTYPES[self.spec.dtype][0]
        scales = np.empty(slices[-1].stop, "<f4")
        error = np.zeros(len(dim))

        def encode(at: slice) -> tuple[bytes, NDArray[np.float64]]:
            rows = self.chunk_memory(layout.chunk_shape, dtype)
            fetch(at, rows)
            x = as_float32(rows[: at.stop - at.start], self.spec.dtype)
            q, scales[at] = quantise(x, dim)
            wrong = (x - dequantise(q, scales[at], dim))[kept[at]].astype("<f8")
            return encode_chunk(pad_chunk(q, layout), layout.codec), np.einsum("nd,nd->d", wrong, wrong)

        found = self.in_order(encode, slices)

        def chunks() -> Iterator[bytes]:
            for data, squared in found:
                np.add(error, squared, out=error)
                yield data

        return {
            **self.write_file(write, hook, shard, shard_pieces(chunks(), layout), True),
            **self.write_vector(write, f"scale/{hook}/row", shard, scales),
            **self.write_row(write, f"scale/{hook}/dim", shard, dim),
            **self.write_row(write, f"stats/{hook}/sum_of_squared_error", shard, error),
        }

    def in_order(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yields results in order; only a few are computed ahead. The first ones start at once."""
        left = iter(items)
        waiting = deque(self.pool.submit(function, item) for item in islice(left, 2 * self.threads + 1))

        def results() -> Iterator[Result]:
            try:
                while waiting:
                    yield waiting.popleft().result()
                    waiting.extend(self.pool.submit(function, item) for item in islice(left, 1))
            finally:
                for future in waiting:
                    future.cancel()

        return results()

    def chunk_memory(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Returns memory for one chunk, which each thread reuses for all its chunks."""
        if getattr(self.local, "key", None) != (shape, dtype):
            self.local.key, self.local.chunk = (shape, dtype), np.empty(shape, dtype)
        chunk: NDArray[Any] = self.local.chunk
        return chunk

    def write_vector(self, write: Write, array: str, shard: int, rows: NDArray[Any]) -> Sizes:
        return self.write_file(write, array, shard, encode_shard(rows, self.layouts[array]), False)

    def write_row(self, write: Write, array: str, shard: int, row: NDArray[Any]) -> Sizes:
        dtype = self.spec.rows_of_shards()[array][1]
        return self.write_file(write, array, shard, [with_crc(row.astype(dtype).tobytes())], True)

    def write_file(
        self,
        write: Write,
        array: str,
        shard: int,
        pieces: Iterable[Buffer],
        matrix: bool,
    ) -> Sizes:
        size = crc = 0

        def counted() -> Iterator[Buffer]:
            nonlocal size, crc
            for piece in pieces:
                size, crc = size + len(piece), crc32(piece, crc)
                yield piece

        write(shard_file(array, shard, matrix), counted())
        return {array: (size, crc)}
