"""Reads a store back: inner chunks straight from their files, each checked and decoded into the caller's memory.

Reads are positional, into one buffer per thread; no memory is allocated per chunk, and no Zarr library is involved.
Property-tested equal to zarr-python, which takes over where an array was rewritten with other codecs
(shared/store/foreign.py). Open files and shard indexes are kept, both bounded over the whole process.
"""

import threading
from collections import deque
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Final, Protocol, runtime_checkable
from weakref import ReferenceType, ref

import numpy as np
from numpy.typing import NDArray

from shared.errors import DamagedError
from shared.files.base import OpenFile
from shared.gate import BadData, members, parse_json
from shared.store.opened import Store
from shared.store.shard import ShardLayout, check_index, decode_chunk, decode_index
from shared.store.spec import shard_file, sharded_document

FILES: Final = 4096
"""Files of one array that are remembered. shared/files/handles.py decides how many of them are open."""
INDEX_BYTES: Final = 64 << 20
"""Bytes of the shard indexes that all readers keep: 2 kB each with the default of 128 chunks per shard."""
OVERHEAD: Final = 256
"""Bytes of memory per kept index, in addition to its content."""
DECIDES_THE_BYTES: Final = ("shape", "data_type", "chunk_grid", "chunk_key_encoding", "codecs")
"""The members of an array's description that decide its bytes."""


@runtime_checkable
class Reader(Protocol):
    """Reads inner chunks of one sharded array."""

    store: Store
    layout: ShardLayout

    def read(self, shard: int, chunk: int, out: NDArray[Any] | None = None, *, check: bool = True) -> NDArray[Any]:
        """Returns the rows of one inner chunk, decoded into `out` (chunk_rows, *row_shape), as a view of it.
        `check=False` skips the chunk's checksum. Raises DamagedError."""
        ...

    def read_run(self, shard: int, first: int, count: int, out: NDArray[Any], *, check: bool = True) -> NDArray[Any]:
        """Reads `count` neighbouring chunks in one request, into `out` (count * chunk_rows, *row_shape)."""
        ...


def open_reader(store: Store, array: str) -> Reader:
    """The fast reader where the array is encoded as its spec says, else zarr-python's. Raises DamagedError when the
    array's description cannot be read."""
    path = f"{array}/zarr.json"
    try:
        found = members(parse_json(store.files.read(path)), DECIDES_THE_BYTES, None)
    except FileNotFoundError as error:
        raise DamagedError(f"{store.name}/{path}: is missing. Restore it from a copy") from error
    except (BadData, OSError) as error:
        raise DamagedError(f"{store.name}/{path}: cannot be read ({error}). Restore it from a copy") from error
    if not is_foreign(store, array, found):
        return ArrayReader(store, array)
    from shared.store.foreign import ZarrReader

    return ZarrReader(store, array, found)


def is_foreign(store: Store, array: str, document: dict[str, Any]) -> bool:
    """Whether a sharded array was encoded in another way than ours. Raises BadData when the document describes no
    array."""
    written = sharded_document(store.spec.n_tokens, store.spec.layouts()[array], {})
    found = members(document, DECIDES_THE_BYTES, None)
    return any(found[key] != written[key] for key in DECIDES_THE_BYTES)


class IndexCache:
    """Counts the shard indexes that the readers of this process keep, and drops the oldest beyond `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self.lock = threading.Lock()
        self.kept: deque[tuple[ReferenceType[ArrayReader], int, int]] = deque()

    def count(self, reader: "ArrayReader", shard: int, size: int) -> None:
        """Records that a reader keeps one more index."""
        with self.lock:
            self.kept.append((ref(reader), shard, size))
            self.size += size
            while self.size > self.limit:
                owner, oldest, freed = self.kept.popleft()
                self.size -= freed
                if (there := owner()) is not None:
                    there.indexes.pop(oldest, None)


INDEXES: Final = IndexCache(INDEX_BYTES)


class ArrayReader:
    """Reads and checks inner chunks of one sharded array. Any number of threads may share one."""

    def __init__(self, store: Store, array: str) -> None:
        self.store, self.array = store, array
        self.layout = store.spec.layouts()[array]
        self.file: Callable[[int], OpenFile] = lru_cache(maxsize=FILES)(partial(open_shard, store, array, self.layout))
        self.indexes: dict[int, NDArray[np.uint64]] = {}

    def path(self, shard: int) -> str:
        return shard_file(self.array, shard, bool(self.layout.row_shape))

    def index(self, shard: int) -> NDArray[np.uint64]:
        found = self.indexes.get(shard)
        if found is None:
            found = self.indexes[shard] = self.read_index(shard)
            INDEXES.count(self, shard, found.nbytes + OVERHEAD)
        return found

    def read_index(self, shard: int) -> NDArray[np.uint64]:
        size, length = self.store.commits[shard].files[self.array][0], self.layout.index_bytes
        what = f"{self.store.name}/{self.path(shard)}"
        if size < length:
            raise DamagedError(f"{what}: {size} bytes were committed, too few for a shard")
        rows = self.store.commits[shard].rows
        file = self.file(shard)
        try:
            return read_index(file, size, self.layout, rows, what)
        except DamagedError:
            if not file.forget(size - length, length):
                raise
            return read_index(file, size, self.layout, rows, what)

    def chunk_rows(self, shard: int, chunk: int) -> int:
        """Rows of a chunk that exist (the last one of the array may be short)."""
        rows = self.store.commits[shard].rows - chunk * self.layout.chunk_rows
        return max(0, min(self.layout.chunk_rows, rows))

    def read(self, shard: int, chunk: int, out: NDArray[Any] | None = None, *, check: bool = True) -> NDArray[Any]:
        whole = np.empty(self.layout.chunk_shape, self.layout.dtype) if out is None else out
        return self.read_run(shard, chunk, 1, whole, check=check)

    def read_run(self, shard: int, first: int, count: int, out: NDArray[Any], *, check: bool = True) -> NDArray[Any]:
        places = self.index(shard)[first : first + count].tolist()
        begin, end = places[0][0], sum(places[-1])
        file, rows = self.file(shard), self.layout.chunk_rows
        for again in (True, False):
            data = memoryview(file.read(begin, end - begin))
            try:
                for number, (offset, length) in enumerate(places):
                    part = data[offset - begin : offset - begin + length]
                    what = f"{self.store.name}/{self.path(shard)}: chunk {first + number}"
                    decode_chunk(part, self.layout, out[number * rows : (number + 1) * rows], what, check)
                break
            except DamagedError:
                if not (again and file.forget(begin, end - begin)):
                    raise
        return out[: (count - 1) * rows + self.chunk_rows(shard, first + count - 1)]


def open_shard(store: Store, array: str, layout: ShardLayout, shard: int) -> OpenFile:
    """Opens a shard's file. It is no method, because a cache that refers to its reader would keep the reader and its
    files alive."""
    return store.files.open(shard_file(array, shard, bool(layout.row_shape)), *store.commits[shard].files[array])


def read_index(file: OpenFile, size: int, layout: ShardLayout, rows: int, what: str) -> NDArray[np.uint64]:
    """The index at the end of a shard's file of `size` bytes that holds `rows` rows. Raises DamagedError."""
    end = size - layout.index_bytes
    index = decode_index(file.read(end, layout.index_bytes), layout, what)
    try:
        check_index(index, -(-rows // layout.chunk_rows), end)
    except ValueError as error:
        raise DamagedError(f"{what}: {error}") from error
    return index


def read_shard(reader: Reader, shard: int) -> NDArray[Any]:
    """All rows of a shard, in stored order."""
    rows = reader.layout.chunk_rows
    count = -(-reader.store.commits[shard].rows // rows)
    out = np.empty((count * rows, *reader.layout.row_shape), reader.layout.dtype)
    for chunk in range(count):
        reader.read(shard, chunk, out[chunk * rows : (chunk + 1) * rows])
    return out[: reader.store.commits[shard].rows]


def read_places(contexts: Reader, positions: Reader, shard: int) -> NDArray[np.int64]:
    """The token to which each row of a shard belongs, as a place in the shard's part of the token stream, [n] in stored
    order. Raises DamagedError unless each token occurs once."""
    store = contexts.store
    context, position = (read_shard(reader, shard).astype(np.int64) for reader in (contexts, positions))
    start, stop = store.spec.shard_range(shard)
    inside: NDArray[np.int64] = context * store.spec.context + position - start
    right = position.max(initial=0) < store.spec.context and inside.min(initial=0) >= 0
    if not right or inside.max(initial=0) >= stop - start or not np.bincount(inside, minlength=stop - start).all():
        raise DamagedError(f"{store.name}/index: shard {shard} names other tokens than its own")
    return inside
