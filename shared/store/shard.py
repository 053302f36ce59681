"""The bytes of one shard: encodes rows to Zarr v3's `sharding_indexed` and decodes them.

A shard holds `chunks_per_shard` inner chunks of `chunk_rows` whole rows. Each chunk is encoded on its own (blosc, then
crc32c), so a reader decodes 2 MiB at a time; the index of (offset, length) pairs and its crc32c close the file. Only
whole shards are written: written chunk by chunk, a shard would be encoded again for each chunk. This module opens no
file.
"""

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from crc32c import crc32c as crc32c_of  # releases the GIL, unlike google-crc32c
from isal import isal_zlib
from numcodecs import blosc
from numpy.typing import NDArray

from shared.errors import DamagedError
from shared.files.base import OpenFile
from shared.files.handles import Buffer

blosc.use_threads = False  # parallelism is across chunks, in our own threads

BLOCK_BYTES = 8 << 20
"""Bytes of a whole file that are read at a time."""
MISSING = np.uint64(2**64 - 1)
"""Index entry of an inner chunk that lies wholly beyond the end of the array."""


CodecName = Literal["zstd", "lz4", "none", "int8"]


@dataclass(frozen=True)
class Blosc:
    """Parameters of blosc. The block size is explicit because blosc's own choice loses 13 % of the ratio on bf16."""

    cname: str
    clevel: int
    shuffle: str
    blocksize: int


@dataclass(frozen=True)
class Codec:
    """How a hookpoint's rows are stored (docs/how-to/add-a-codec.md)."""

    help: str
    """What to choose it for, in a few words for `--help`."""
    ratio: float
    """Bytes of bfloat16 activations for each byte stored: the estimate until the first shard is measured."""
    blosc: Blosc | None
    """What each chunk goes through. None: it is stored as it is."""
    lossy: bool = False
    """Whether rows are first quantised to one byte for each number. Only int8 is (shared/store/quantise.py)."""

    def expected_ratio(self, dtype: str, itemsize: int) -> float:
        """Bytes of activations for each byte stored. Float types other than bfloat16 are taken not to compress."""
        if self.lossy:
            return self.ratio * itemsize / 2
        return self.ratio if dtype == "bfloat16" else 1.0


CODECS: Final[Mapping[CodecName, Codec]] = {
    "zstd": Codec("smallest without loss", 1.4, Blosc("zstd", 1, "shuffle", 1 << 20)),
    "lz4": Codec("half the time of zstd to write, an eighth larger", 1.3, Blosc("lz4", 5, "bitshuffle", 1 << 18)),
    "none": Codec("no compression", 1.0, None),
    "int8": Codec("lossy: half of bfloat16, 42 dB", 1.98, None, lossy=True),
}
"""By the name that `--codec` takes."""


def codec_help() -> str:
    """Every codec and what to choose it for, in one line."""
    return "; ".join(f"{name}: {codec.help}" for name, codec in CODECS.items()) + "."


SHUFFLES = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2}
BLOSC_HEADER: Final = struct.Struct("<BBBBIII")
"""Format, format of the compressor, flags, typesize; bytes of the values, of a block, of the whole buffer."""
BLOSC_FORMAT: Final = 2
COMPRESSOR_FORMAT: Final = 1
COMPRESSORS: Final = {"lz4": 1, "lz4hc": 1, "zlib": 3, "zstd": 4}
"""Numbers in the upper three bits of the flags, of the compressors whose decoders receive the bounds of what they read
and write, and keep to them. Others are refused."""
STORED, RESERVED = 0b10, 0b1000
"""Flags: the values follow uncompressed; reserved."""
BLOSC_MOST: Final = 2**31 - 1 - 16
"""Largest number of bytes of values in one buffer."""


@dataclass(frozen=True)
class ShardLayout:
    """The shape of one array's shards."""

    chunk_rows: int
    chunks_per_shard: int
    row_shape: tuple[int, ...]
    """Shape of one row: (d_in,) for activations, () for an index."""
    dtype: np.dtype[Any]
    codec: CodecName
    fill: float | int

    @property
    def shard_rows(self) -> int:
        return self.chunk_rows * self.chunks_per_shard

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        return (self.chunk_rows, *self.row_shape)

    @property
    def index_bytes(self) -> int:
        return 16 * self.chunks_per_shard + 4


def crc32c(data: Buffer, before: int = 0) -> int:
    """The CRC-32C of `data`, continuing from the CRC `before`."""
    return crc32c_of(data, before)


def crc32(data: Buffer, before: int = 0) -> int:
    """The CRC-32 of `data`, continuing from the CRC `before`. Whole files use another polynomial than chunks: the
    crc32c of bytes that end in their own crc32c depends only on their number, and could not tell one shard from
    another."""
    return isal_zlib.crc32(data, before)


def file_crc(file: OpenFile, size: int) -> int:
    """The CRC-32 of a whole file, read block by block."""
    crc = 0
    for at in range(0, size, BLOCK_BYTES):
        crc = crc32(file.read(at, min(BLOCK_BYTES, size - at)), crc)
    return crc


def crc_bytes(data: Buffer) -> bytes:
    return crc32c(data).to_bytes(4, "little")


def with_crc(data: bytes) -> bytes:
    return data + crc_bytes(data)


def without_crc(data: Buffer, what: str, check: bool = True) -> memoryview:
    """The payload before the trailing crc32c. Raises DamagedError when it does not match."""
    view = memoryview(data)
    payload = view[:-4]
    if len(view) < 4 or (check and crc32c(payload) != int.from_bytes(view[-4:], "little")):
        raise DamagedError(f"{what}: the checksum (crc32c) does not match its {len(view)} bytes")
    return payload


def encode_chunk(rows: NDArray[Any], codec: CodecName) -> bytes:
    """Encodes C-contiguous `rows`, without the crc32c that follows in the file."""
    parameters = CODECS[codec].blosc
    if parameters is None:
        return rows.tobytes()
    packed: bytes = blosc.compress(
        rows,
        parameters.cname.encode(),
        parameters.clevel,
        SHUFFLES[parameters.shuffle],
        parameters.blocksize,
        rows.dtype.itemsize,
    )
    return packed


def decode_chunk(data: Buffer, layout: ShardLayout, out: NDArray[Any], what: str, check: bool = True) -> None:
    """Decodes one inner chunk into `out` (chunk_rows, *row_shape), C-contiguous, and checks its crc32c if `check`.
    Raises DamagedError."""
    payload = without_crc(data, what, check)
    try:
        unpack(payload, layout, out)
    except (RuntimeError, ValueError) as error:
        raise DamagedError(
            f"{what}: its bytes do not decode to {layout.chunk_shape} {layout.dtype} ({error})"
        ) from error


def decoded_chunk(data: Buffer, layout: ShardLayout, out: NDArray[Any], what: str) -> NDArray[Any]:
    """The rows of one inner chunk, its crc32c checked: decoded into `out`, or a view of `data` where they are stored as
    they are. Raises DamagedError."""
    if CODECS[layout.codec].blosc or len(data) != out.nbytes + 4:
        decode_chunk(data, layout, out, what)
        return out
    return np.frombuffer(without_crc(data, what), layout.dtype).reshape(out.shape)


def unpack(payload: memoryview, layout: ShardLayout, out: NDArray[Any]) -> None:
    """Decodes one inner chunk without its crc32c. For any bytes, it reads nothing else and either fills `out` or raises
    ValueError or RuntimeError."""
    if parameters := CODECS[layout.codec].blosc:
        check_blosc(payload, parameters.cname, layout.dtype.itemsize, out.nbytes)
        blosc.decompress(payload, out)
        return
    if len(payload) != out.nbytes:  # numpy would broadcast a single byte
        raise ValueError(f"{len(payload)} bytes instead of {out.nbytes}")
    out.reshape(-1).view(np.uint8)[:] = np.frombuffer(payload, np.uint8)


def check_blosc(payload: memoryview, cname: str, itemsize: int, nbytes: int) -> None:
    """Raises ValueError unless a blosc buffer holds exactly `nbytes` bytes of values in our compressor, and its header
    agrees. blosc trusts its header: it reads as many bytes as that names, and leaves what it does not fill untouched.
    The decoders check the content of the blocks (docs/explanation/threat-model.md)."""
    compressor, typesize, values = check_header(payload)
    if compressor != COMPRESSORS[cname]:
        raise ValueError(f"its blosc header is not of a buffer packed with {cname}")
    if (typesize, values) != (itemsize, nbytes):
        raise ValueError(
            f"its blosc header names {values} bytes of values of {typesize} bytes; {nbytes} bytes of values of "
            f"{itemsize} bytes are expected"
        )


def check_any_blosc(payload: memoryview, most: int) -> None:
    """The same check for a buffer of another tool, with at most `most` bytes of values."""
    compressor, _, values = check_header(payload)
    if compressor not in COMPRESSORS.values() or values > most:
        raise ValueError(f"its blosc header is of a buffer of {values} bytes, in a compressor of number {compressor}")


def check_header(payload: memoryview) -> tuple[int, int, int]:
    """The compressor's number, the size of a value, and the bytes of all values of a blosc buffer. Raises ValueError
    unless its header and the starts of its blocks are consistent with each other and with its length."""
    if len(payload) < BLOSC_HEADER.size:
        raise ValueError(f"{len(payload)} bytes are no blosc buffer")
    version, inner, flags, typesize, values, block, size = BLOSC_HEADER.unpack_from(payload)
    if (version, inner, flags & RESERVED) != (BLOSC_FORMAT, COMPRESSOR_FORMAT, 0):
        raise ValueError("its blosc header is of another format")
    if size != len(payload):
        raise ValueError(f"its blosc header names {size} bytes, it is {len(payload)} bytes long")
    if not typesize or not 0 < block <= values or block % typesize:
        raise ValueError(f"its blosc header names blocks of {block} bytes in {values} bytes of values")
    if flags & STORED:
        if size != values + BLOSC_HEADER.size:
            raise ValueError(f"its blosc header names {values} bytes as they are, {size - BLOSC_HEADER.size} follow")
        return flags >> 5, typesize, values
    first = BLOSC_HEADER.size + 4 * -(-values // block)
    if first > size:
        raise ValueError(f"its {size} bytes cannot hold its blocks of {block} bytes")
    starts = np.frombuffer(payload[BLOSC_HEADER.size : first], "<i4")
    if starts.min() < first or starts.max() > size - 4:
        raise ValueError("it has blocks that begin outside it")
    return flags >> 5, typesize, values


def pad_chunk(rows: NDArray[Any], layout: ShardLayout) -> NDArray[Any]:
    """The rows of a chunk at the array's end, padded to a whole chunk as Zarr requires."""
    if len(rows) == layout.chunk_rows:
        return rows
    whole = np.full(layout.chunk_shape, layout.fill, layout.dtype)
    whole[: len(rows)] = rows
    return whole


def shard_pieces(chunks: Iterable[bytes], layout: ShardLayout) -> Iterator[bytes]:
    """Yields the file of a shard piece by piece: its encoded chunks, each with its crc32c, then the index with its own.
    Chunks beyond the last are marked missing."""
    index = np.full((layout.chunks_per_shard, 2), MISSING, "<u8")
    end = 0
    for number, chunk in enumerate(chunks):
        index[number] = end, len(chunk) + 4
        end += len(chunk) + 4
        yield chunk
        yield crc_bytes(chunk)
    yield with_crc(index.tobytes())


def encode_shard(rows: NDArray[Any], layout: ShardLayout) -> Iterator[bytes]:
    """Yields the file of one shard for `rows` (n <= shard_rows, *row_shape), piece by piece."""
    if len(rows) > layout.shard_rows or rows.shape[1:] != layout.row_shape or rows.dtype != layout.dtype:
        raise ValueError(
            f"rows {rows.shape} {rows.dtype} do not fit shards of {layout.shard_rows} {layout.row_shape} {layout.dtype}"
        )
    parts = (rows[i : i + layout.chunk_rows] for i in range(0, len(rows), layout.chunk_rows))
    return shard_pieces((encode_chunk(np.ascontiguousarray(pad_chunk(p, layout)), layout.codec) for p in parts), layout)


def decode_index(tail: Buffer, layout: ShardLayout, what: str) -> NDArray[np.uint64]:
    """(chunks_per_shard, 2) offsets and lengths from a shard's last `layout.index_bytes` bytes."""
    payload = without_crc(tail, f"{what}: index")
    return np.frombuffer(payload, "<u8").reshape(layout.chunks_per_shard, 2).copy()  # the bytes may be a scratch buffer


def check_index(index: NDArray[np.uint64], used: int, end: int) -> None:
    """Raises ValueError unless `used` chunks lie one after another from 0 to `end`, and there are no others."""
    if not 0 < used <= len(index) or (index[:used] > end).any():
        raise ValueError(f"its index names chunks beyond the {end} bytes of chunks")
    offsets, lengths = index[:used].astype(np.int64).T
    ends = np.cumsum(lengths)
    if offsets[0] or (offsets[1:] != ends[:-1]).any() or ends[-1] != end or (index[used:] != MISSING).any():
        raise ValueError(f"its index is not of {used} chunks, one after another, in {end} bytes")


def as_float32(rows: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Stored rows as numbers; `dtype` is the logical one (bfloat16 is stored as its bit pattern)."""
    if dtype == "bfloat16":
        return (rows.astype("<u4") << 16).view("<f4")
    return rows.astype("<f4", copy=False)
