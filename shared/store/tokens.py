"""The token ids of a store, read chunk by chunk: memory does not grow with the store.

A caller that needs ids takes a slice of contexts; a caller that needs to know which rows count takes a slice of the
token stream. A chunk that is read again must be the same as before.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from shared.errors import DamagedError
from shared.files.base import Files
from shared.store.shard import crc32, decode_chunk
from shared.store.spec import StoreSpec, rows_that_count, shard_file, token_layout

CHUNKS_KEPT: Final = 4
"""Decoded chunks kept, about a million ids each: shards are captured in order, a few of them per chunk."""


@runtime_checkable
class TokenMask(Protocol):
    """Marks rows of the token stream, computed on request."""

    def __getitem__(self, rows: slice) -> NDArray[np.bool_]:
        """[stop - start] bool."""
        ...


def flat(mask: NDArray[np.bool_] | TokenMask) -> NDArray[np.bool_] | TokenMask:
    """A mask [contexts, context] in memory, or one that is computed on request, as a mask of the token stream."""
    return mask.reshape(-1) if isinstance(mask, np.ndarray) else mask


class TokenRows:
    """Token ids [n_contexts, context] in corpus order. Any number of threads may share one."""

    def __init__(self, files: Files, spec: StoreSpec) -> None:
        self.files, self.spec = files, spec
        self.layout = token_layout(spec.context, spec.token_dtype)
        self.kept: OrderedDict[int, NDArray[Any]] = OrderedDict()
        self.crcs: dict[int, int] = {}
        """crc32 of the chunks that were read."""
        self.lock = threading.Lock()

    @property
    def shape(self) -> tuple[int, int]:
        return self.spec.n_contexts, self.spec.context

    @property
    def n_chunks(self) -> int:
        return -(-self.spec.n_contexts // self.layout.chunk_rows)

    def __len__(self) -> int:
        return self.spec.n_contexts

    def __getitem__(self, contexts: slice) -> NDArray[Any]:
        """Neighbouring contexts, [n, context]. Raises DamagedError."""
        first, last, step = contexts.indices(len(self))
        assert step == 1
        size, last = self.layout.chunk_rows, max(first, last)
        parts = [
            self.chunk(number)[max(0, first - number * size) : last - number * size]
            for number in range(first // size, -(-last // size))
        ]
        return (
            parts[0]
            if len(parts) == 1
            else np.concatenate([np.empty((0, self.spec.context), self.layout.dtype), *parts])
        )

    def take(self, contexts: NDArray[np.int64]) -> NDArray[Any]:
        """The given contexts, sorted, [n, context]. Raises DamagedError."""
        found = np.empty((len(contexts), self.spec.context), self.layout.dtype)
        chunks = contexts // self.layout.chunk_rows
        for number in np.unique(chunks).tolist():
            found[chunks == number] = self.chunk(number)[contexts[chunks == number] - number * self.layout.chunk_rows]
        return found

    def blocks(self) -> Iterator[NDArray[Any]]:
        """Yields all contexts, chunk by chunk. Raises DamagedError at the end when they are not what was written."""
        digest = hashlib.blake2b(digest_size=16)
        for number in range(self.n_chunks):
            block = self.chunk(number)
            digest.update(memoryview(block))  # type: ignore[arg-type]  # without a copy
            yield block
        if digest.hexdigest() != self.spec.corpus["ids_blake2b"]:
            raise DamagedError(f"{self.files.name}/tokens: the token ids are not the ones that were written")

    def check(self) -> "TokenRows":
        """Reads all contexts once. Raises DamagedError when they are not what was written."""
        for _ in self.blocks():
            pass
        return self

    def chunk(self, number: int) -> NDArray[Any]:
        """[contexts of the chunk, context]. Raises DamagedError."""
        with self.lock:
            if number in self.kept:
                self.kept.move_to_end(number)
                return self.kept[number]
        found = self.read_chunk(number)
        with self.lock:
            self.kept[number] = found
            while len(self.kept) > CHUNKS_KEPT:
                self.kept.popitem(last=False)
        return found

    def read_chunk(self, number: int) -> NDArray[Any]:
        path = shard_file("tokens", number, True)
        what = f"{self.files.name}/{path}"
        try:
            data = self.files.read(path)
        except FileNotFoundError as error:
            raise DamagedError(f"{what}: is missing. Restore it from a copy") from error
        if self.crcs.setdefault(number, crc := crc32(data)) != crc:
            raise DamagedError(f"{what}: changed since it was first read. Was the store replaced?")
        ids = np.empty((self.layout.chunk_rows, self.spec.context), self.layout.dtype)
        decode_chunk(data, self.layout, ids, what)
        return ids[: self.spec.n_contexts - number * self.layout.chunk_rows]


class CountedMask:
    """Marks the rows that count in the moments, for any slice of the token stream."""

    def __init__(self, tokens: TokenRows) -> None:
        self.tokens = tokens

    def __getitem__(self, rows: slice) -> NDArray[np.bool_]:
        spec = self.tokens.spec
        start, stop, _ = rows.indices(spec.n_contexts * spec.context)
        first, last = start // spec.context, -(-stop // spec.context)
        keep = rows_that_count(self.tokens[first:last], spec).reshape(-1)
        return keep[start - first * spec.context : stop - first * spec.context]
