"""A shard's bytes: what we write any Zarr reads, what we read is what zarr-python reads, and damage is never silent."""

import re
from typing import Any, get_args

import numpy as np
import pytest
import zarr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.command import ROOT
from zarr.codecs import BloscCodec, Crc32cCodec

from shared.errors import DamagedError
from shared.store.shard import (
    CODECS,
    COMPRESSORS,
    Blosc,
    Codec,
    CodecName,
    ShardLayout,
    as_float32,
    codec_help,
    decode_chunk,
    decode_index,
    encode_shard,
)

FILLS = {"<u2": 0x7FC0, "<f2": float("nan"), "<f4": float("nan"), "<u4": 7}


def layout(
    codec: CodecName = "zstd", dtype: str = "<u2", chunk_rows: int = 8, chunks: int = 4, width: int | None = 5
) -> ShardLayout:
    return ShardLayout(chunk_rows, chunks, () if width is None else (width,), np.dtype(dtype), codec, FILLS[dtype])


def decode_shard(data: bytes, shape: ShardLayout, rows: int) -> NDArray[Any]:
    index = decode_index(data[-shape.index_bytes :], shape, "shard")
    out = np.zeros((shape.shard_rows, *shape.row_shape), shape.dtype)
    for chunk in range(-(-rows // shape.chunk_rows)):
        offset, length = map(int, index[chunk])
        part = out[chunk * shape.chunk_rows : (chunk + 1) * shape.chunk_rows]
        decode_chunk(data[offset : offset + length], shape, part, "chunk")
    return out[:rows]


@settings(max_examples=60, deadline=None)
@example(codec="lz4", dtype="<f2", chunk_rows=6, chunks=4, width=None, fraction=0.3125, seed=52)
@given(
    codec=st.sampled_from(sorted(CODECS)), dtype=st.sampled_from(sorted(FILLS)), chunk_rows=st.integers(1, 9),
    chunks=st.integers(1, 5), width=st.none() | st.integers(1, 7), fraction=st.floats(0.01, 1), seed=st.integers(0, 99),
)  # fmt: skip
def test_round_trip_equals_zarr_python(
    tmp_path_factory: pytest.TempPathFactory, codec: CodecName, dtype: str, chunk_rows: int, chunks: int,
    width: int | None, fraction: float, seed: int,
) -> None:  # fmt: skip
    shape = layout(codec, dtype, chunk_rows, chunks, width)
    n = max(1, int(fraction * shape.shard_rows))
    bits = np.random.default_rng(seed).integers(0, 256, (n, *shape.row_shape, shape.dtype.itemsize), dtype=np.uint8)
    rows = bits.view(shape.dtype)[..., 0]
    data = b"".join(encode_shard(rows, shape))
    assert decode_shard(data, shape, n).tobytes() == rows.tobytes()

    folder = tmp_path_factory.mktemp("zarr")
    parameters = CODECS[codec].blosc
    blosc = [] if parameters is None else [BloscCodec(typesize=shape.dtype.itemsize, **vars(parameters))]
    array = zarr.create_array(
        folder, shape=(n, *shape.row_shape), dtype=shape.dtype, chunks=shape.chunk_shape,
        shards=(shape.shard_rows, *shape.row_shape), compressors=[*blosc, Crc32cCodec()],
        filters=None, fill_value=shape.fill,
        config={"write_empty_chunks": True},  # else it leaves out a chunk whose random bits are all NaN, the fill value
    )  # fmt: skip
    file = folder / "c" / "0" if width is None else folder / "c" / "0" / "0"
    file.parent.mkdir(parents=True)
    file.write_bytes(data)
    assert np.asarray(array[:]).tobytes() == rows.tobytes()
    array[:] = rows
    assert decode_shard(file.read_bytes(), shape, n).tobytes() == rows.tobytes()


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_every_flipped_bit_of_a_chunk_or_the_index_is_seen(codec: CodecName) -> None:
    shape = layout(codec, chunk_rows=3, chunks=2, width=2)
    data = b"".join(encode_shard(np.arange(12, dtype="<u2").reshape(6, 2), shape))
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedError, match="checksum"):
            decode_shard(bytes(damaged), shape, 6)


def test_a_truncated_chunk_is_damage() -> None:
    for length in range(3):
        with pytest.raises(DamagedError):
            decode_chunk(b"\0" * length, layout(), np.empty((8, 5), "<u2"), "chunk")


def test_blocksize_is_the_one_that_keeps_the_ratio() -> None:
    """bf16 Gaussians have an order-0 limit near 1.5; blosc's own block size reaches only about 1.27."""
    values = np.random.default_rng(0).standard_normal((4096, 256)).astype("<f4")
    rows = (values.view("<u4") >> 16).astype("<u2")
    assert np.allclose(as_float32(rows, "bfloat16"), values, rtol=2**-7)
    size = sum(map(len, encode_shard(rows, layout("zstd", chunk_rows=4096, chunks=1, width=256))))
    assert rows.nbytes / size > 1.4


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        encode_shard(np.zeros((33, 5), "<u2"), layout())
    with pytest.raises(ValueError, match="do not fit"):
        encode_shard(np.zeros((8, 5), "<u4"), layout())


def test_the_names_of_codecs_are_those_of_the_table() -> None:
    assert get_args(CodecName) == tuple(CODECS)
    assert all(codec.blosc is None or codec.blosc.cname in COMPRESSORS for codec in CODECS.values())
    assert "int8: lossy" in codec_help()


@pytest.mark.parametrize("codec", CODECS)
def test_what_a_codec_is_expected_to_save(codec: CodecName) -> None:
    """float32 and float16 are taken not to compress; int8 has one byte for each number of any type."""
    ratios = [CODECS[codec].expected_ratio(dtype, size) for dtype, size in (("bfloat16", 2), ("float32", 4))]
    assert ratios == {"zstd": [1.4, 1], "lz4": [1.3, 1], "none": [1, 1], "int8": [1.98, 3.96]}[codec]


def test_the_page_adds_a_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/how-to/add-a-codec.md: with its entry (in the place of lz4's), rows go
    through the codec and come back; what another codec packed is refused."""
    page = (ROOT / "docs/how-to/add-a-codec.md").read_text(encoding="utf-8")
    name, entry = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    known = ", ".join(f'"{codec}"' for codec in CODECS)
    assert name == f'CodecName = Literal[{known}, "lz4hc"]\n'
    table = dict(CODECS)
    exec(entry, {"CODECS": table, "Codec": Codec, "Blosc": Blosc})
    monkeypatch.setitem(CODECS, "lz4", table["lz4hc"])  # type: ignore[index]
    shape = layout("lz4", chunk_rows=64, chunks=2, width=32)
    rows = np.arange(128 * 32, dtype="<u2").reshape(128, 32)
    data = b"".join(encode_shard(rows, shape))
    assert len(data) < rows.nbytes / 2
    assert decode_shard(data, shape, 128).tobytes() == rows.tobytes()
    with pytest.raises(DamagedError, match="not of a buffer packed with zstd"):
        decode_shard(data, layout("zstd", chunk_rows=64, chunks=2, width=32), 128)
