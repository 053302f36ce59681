"""Arrays that another tool encoded anew, with codecs that are not ours, through zarr-python. Slow and general.

Such codecs may check nothing, so a shard's whole file is compared with its committed crc32 before its first use.
The one door to Zarr.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import DamagedError
from shared.remote import RemoteFiles
from shared.shard import file_crc
from shared.spec import shard_file
from shared.store import Store


class ZarrReader:
    """The same answers as shared.reader.ArrayReader, for any codec that zarr-python has."""

    def __init__(self, store: Store, array: str) -> None:
        import zarr

        self.store, self.array = store, array
        self.layout = store.spec.layouts()[array]
        place: Any
        if isinstance(store.files, RemoteFiles):
            place, path = (
                zarr.storage.ObjectStore(store.files.client.reads, read_only=True),
                store.files.place(array)[0],
            )
        else:
            place, path = store.root, array
        try:
            self.zarr = zarr.open_array(place, path=path, mode="r")
        except Exception as error:  # whatever a codec that is not installed raises
            raise DamagedError(f"{store.name}/{array}: zarr-python cannot open it ({error})") from error
        shape = (store.spec.n_tokens, *self.layout.row_shape)
        if self.zarr.shape != shape or self.zarr.dtype != self.layout.dtype:
            found = f"{self.zarr.shape} {self.zarr.dtype}"
            raise DamagedError(f"{store.name}/{array}: is {found}, the store says {shape} {self.layout.dtype}")
        self.check_grid()
        self.checked = lru_cache(maxsize=1 << 16)(self.check_file)

    def check_grid(self) -> None:
        """A commit vouches for one file a shard: other files would be read unchecked."""
        whole = (self.layout.shard_rows, *self.layout.row_shape)
        file = shard_file(self.array, 0, bool(self.layout.row_shape))
        key = self.zarr.metadata.encode_chunk_key((0,) * len(whole))
        if (self.zarr.shards or self.zarr.chunks) != whole or f"{self.array}/{key}" != file:
            raise DamagedError(f"{self.store.name}/{self.array}: has not one file a shard, named like {file}")

    def check_file(self, shard: int) -> None:
        path = shard_file(self.array, shard, bool(self.layout.row_shape))
        size, crc = self.store.commits[shard].files[self.array]
        if file_crc(self.store.files.open(path, size), size) != crc:
            raise DamagedError(f"{self.store.name}/{path}: the checksum is not the committed one")

    def read(self, shard: int, chunk: int, out: NDArray[Any] | None = None, *, check: bool = True) -> NDArray[Any]:
        whole = np.empty(self.layout.chunk_shape, self.layout.dtype) if out is None else out
        return self.read_run(shard, chunk, 1, whole, check=check)

    def read_run(self, shard: int, first: int, count: int, out: NDArray[Any], *, check: bool = True) -> NDArray[Any]:
        if check:
            self.checked(shard)
        start = self.store.commits[shard].start + first * self.layout.chunk_rows
        stop = min(start + count * self.layout.chunk_rows, self.store.commits[shard].stop)
        try:
            out[: stop - start] = self.zarr[start:stop]
        except Exception as error:  # codecs and stores share no base
            raise DamagedError(f"{self.store.name}/{self.array}: rows {start} to {stop}: {error}") from error
        return out[: stop - start]
