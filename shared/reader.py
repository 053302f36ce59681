"""Reading a store back: inner chunks straight from their files, every one of them checked.

Positional reads and a decode into one buffer: no Zarr library on the way. Property-tested equal to zarr-python.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import DamagedError
from shared.manifest import read_range
from shared.shard import crc32c, decode_chunk, decode_index
from shared.store import Store, shard_file


class ArrayReader:
    """Reads and checks inner chunks of one sharded array. Shard indexes are read once and kept."""

    def __init__(self, store: Store, array: str) -> None:
        self.store, self.array = store, array
        self.layout = store.spec.layouts()[array]
        self.indexes: dict[int, NDArray[np.uint64]] = {}

    def file(self, shard: int) -> tuple[Path, int]:
        path = shard_file(self.store.root, self.array, shard, 1 + len(self.layout.row_shape))
        return path, self.store.commits[shard].files[self.array][0]

    def index(self, shard: int) -> NDArray[np.uint64]:
        if shard not in self.indexes:
            path, size = self.file(shard)
            tail = read_range(path, size - self.layout.index_bytes, None, size)
            self.indexes[shard] = decode_index(tail, self.layout, str(path))
        return self.indexes[shard]

    def chunk_rows(self, shard: int, chunk: int) -> int:
        """Rows of a chunk that exist (the last one of the array may be short)."""
        rows = self.store.commits[shard].rows - chunk * self.layout.chunk_rows
        return max(0, min(self.layout.chunk_rows, rows))

    def read(self, shard: int, chunk: int, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """The rows of one inner chunk. `out` (chunk_rows, *row_shape) is decoded into and a view of it returned."""
        path, size = self.file(shard)
        offset, length = (int(number) for number in self.index(shard)[chunk])
        data = read_range(path, offset, length, size)
        whole = np.empty(self.layout.chunk_shape, self.layout.dtype) if out is None else out
        decode_chunk(data, self.layout, whole, f"{path}: chunk {chunk}")
        return whole[: self.chunk_rows(shard, chunk)]

    def read_shard(self, shard: int) -> NDArray[Any]:
        """All rows of a shard, in stored order."""
        n_chunks = -(-self.store.commits[shard].rows // self.layout.chunk_rows)
        return np.concatenate([self.read(shard, chunk) for chunk in range(n_chunks)])


def verify(store: Store, full: bool) -> list[str]:
    """Everything that is not as committed, one line each. Quick: presence, length and crc32c of every file.
    Full: also decodes every chunk and counts its rows."""
    damage = []
    if store.state == "final" and store.missing:
        damage.append(f"{store.root}: is final, but shards {store.missing} are not in its manifest")
    try:
        store.tokens()
    except DamagedError as error:
        damage.append(str(error))
    layouts = store.spec.layouts()
    for shard, commit in store.commits.items():
        for array, (size, crc) in commit.files.items():
            layout = layouts.get(array)
            file = shard_file(store.root, array, shard, 2 if layout is None else 1 + len(layout.row_shape))
            try:
                if crc32c(read_range(file, 0, None, size)) != crc:
                    raise DamagedError(f"{file}: its checksum is not the committed one")
                if (
                    full
                    and layout is not None
                    and len(rows := ArrayReader(store, array).read_shard(shard)) != commit.rows
                ):
                    raise DamagedError(f"{file}: holds {len(rows)} rows, {commit.rows} were committed")
            except DamagedError as error:
                damage.append(str(error).split(". List all damage")[0])
    return damage
