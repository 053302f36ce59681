"""Reads arrays that another tool rewrote with other codecs, through zarr-python. Slow and general.

Such codecs may check nothing, so a shard's whole file is compared with its committed crc32 before its first use.
"""

import asyncio
import zlib
from functools import lru_cache
from typing import Any, Final

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, GzipCodec
from zarr.registry import register_codec

from shared.errors import DamagedError
from shared.files.remote import RemoteFiles
from shared.gate import BadData, choice, integer, members, parse_json, passed, quoted
from shared.store.opened import Store
from shared.store.shard import check_any_blosc, file_crc
from shared.store.spec import MOST_CHUNKS, shard_file

CODECS: Final = ("bytes", "transpose", "blosc", "zstd", "gzip", "crc32c")
"""Codecs that an array may name. All are compiled into zarr-python's own requirements; none loads anything by its
name."""
SLACK: Final = 1 << 16
"""Bytes by which the input of a codec after another one may exceed those of a chunk."""


def checked_codecs() -> Any:
    """A context in which arrays are opened with decoders that limit how large a chunk can become."""
    ours = {"blosc": CheckedBlosc, "gzip": BoundedGzip}
    return zarr.config.set({f"codecs.{name}": f"{kind.__module__}.{kind.__qualname__}" for name, kind in ours.items()})


def chunk_bytes_of(spec: Any) -> int:
    return int(np.prod(spec.shape, dtype=object)) * int(spec.dtype.to_native_dtype().itemsize)


class CheckedBlosc(BloscCodec):
    """blosc trusts its header, so the header is first compared with the buffer."""

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        data = memoryview(chunk_bytes.to_bytes())
        check_any_blosc(data, chunk_bytes_of(chunk_spec) + SLACK)
        return await super()._decode_single(chunk_bytes, chunk_spec)


class BoundedGzip(GzipCodec):
    """A gzip decoder with a limit: a few bytes of gzip can become gigabytes."""

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        most = chunk_bytes_of(chunk_spec) + SLACK
        data = await asyncio.to_thread(unzipped, chunk_bytes.to_bytes(), most)
        return chunk_spec.prototype.buffer.from_bytes(data)


register_codec("blosc", CheckedBlosc)
register_codec("gzip", BoundedGzip)


def unzipped(data: bytes, most: int) -> bytes:
    """The unpacked bytes. Raises ValueError when there are more than `most`."""
    unpack = zlib.decompressobj(wbits=31)
    found = unpack.decompress(data, most)
    if not unpack.eof:
        raise ValueError(f"is cut short, or holds more than {most} bytes")
    return found


def check_document(document: dict[str, Any], shard_rows: int) -> None:
    """Raises BadData for an array that names an unknown codec, or more chunks than there can be."""
    if document.get("storage_transformers"):
        raise BadData("names storage transformers, which are not read")
    check_codecs(document["codecs"], shard_rows, (*CODECS, "sharding_indexed"))


def check_codecs(codecs: Any, shard_rows: int, allowed: tuple[str, ...]) -> None:
    if not isinstance(codecs, list) or not 0 < len(codecs) <= 8:
        raise BadData(f"codecs is {quoted(codecs)} instead of a list of codecs")
    for codec in codecs:
        codec = members({"name": codec} if isinstance(codec, str) else codec, ("name",), ("configuration",))
        name = choice(codec["name"], "a codec", allowed)
        inside = members(codec.get("configuration", {}), (), None)
        if name == "sharding_indexed":
            members(inside, ("chunk_shape", "codecs", "index_codecs"), None)
            if not isinstance(inside["chunk_shape"], list) or not inside["chunk_shape"]:
                raise BadData(f"chunk_shape is {quoted(inside['chunk_shape'])} instead of a list of sizes")
            for size in inside["chunk_shape"]:
                integer(size, "chunk_shape", 1)
            if -(-shard_rows // inside["chunk_shape"][0]) > MOST_CHUNKS:
                raise BadData(f"chunk_shape makes more than {MOST_CHUNKS:,} chunks per shard")
            check_codecs(inside["codecs"], shard_rows, CODECS)
            check_codecs(inside["index_codecs"], shard_rows, ("bytes", "crc32c"))


class ZarrReader:
    """A reader with the interface of shared.store.reader.ArrayReader, for any of these codecs."""

    def __init__(self, store: Store, array: str, document: dict[str, Any] | None = None) -> None:
        """`document` is the array's zarr.json, if it was read already."""
        self.store, self.array = store, array
        self.layout = store.spec.layouts()[array]
        what = f"{store.name}/{array}"
        with passed(f"{what}/zarr.json"):
            document = document or parse_json(store.files.read(f"{array}/zarr.json"))
            check_document(members(document, ("codecs",), None), self.layout.shard_rows)
        place: Any
        if isinstance(store.files, RemoteFiles):
            place, path = (
                zarr.storage.ObjectStore(store.files.client.reads, read_only=True),
                store.files.place(array)[0],
            )
        else:
            place, path = store.root, array
        try:
            with checked_codecs():
                self.zarr = zarr.open_array(place, path=path, mode="r")
        except Exception as error:  # a missing codec can raise anything
            raise DamagedError(f"{what}: zarr-python cannot open it ({quoted(str(error), 400)})") from error
        shape = (store.spec.n_tokens, *self.layout.row_shape)
        if self.zarr.shape != shape or self.zarr.dtype != self.layout.dtype:
            found = f"{self.zarr.shape} {self.zarr.dtype}"
            raise DamagedError(f"{what}: is {found}, the store says {shape} {self.layout.dtype}")
        self.check_grid()
        self.checked = lru_cache(maxsize=1 << 16)(self.check_file)

    def check_grid(self) -> None:
        """Raises DamagedError unless the array has one file per shard. A commit covers only that file; others would be
        read unchecked."""
        whole = (self.layout.shard_rows, *self.layout.row_shape)
        file = shard_file(self.array, 0, bool(self.layout.row_shape))
        key = self.zarr.metadata.encode_chunk_key((0,) * len(whole))
        if (self.zarr.shards or self.zarr.chunks) != whole or f"{self.array}/{key}" != file:
            raise DamagedError(f"{self.store.name}/{self.array}: does not have one file per shard, named like {file}")

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
        except Exception as error:  # errors of codecs and stores share no base
            raise DamagedError(
                f"{self.store.name}/{self.array}: rows {start} to {stop}: {quoted(str(error), 400)}"
            ) from error
        return out[: stop - start]
