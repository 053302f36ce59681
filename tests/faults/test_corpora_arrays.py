"""Arrays of ids whose chunks say more than they hold."""

from pathlib import Path

import numpy as np
import pytest
import zarr

from harvest.corpus.arrays import zarr_stream
from shared.errors import UserError


def array_of_ids(path: Path) -> Path:
    ids = np.arange(4096, dtype=np.uint16) % 100
    array = zarr.create_array(
        path, shape=ids.shape, chunks=(1024,), dtype=ids.dtype, compressors=zarr.codecs.BloscCodec()
    )
    array[:] = ids
    return path


def test_an_honest_array_of_ids_is_read(tmp_path: Path) -> None:
    stream = zarr_stream(array_of_ids(tmp_path / "ids"), 100)
    assert sum(map(len, stream.blocks())) == 4096


def test_a_chunk_whose_header_says_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    """Was: blosc believed the header, and read beyond the buffer."""
    path = array_of_ids(tmp_path / "ids")
    chunk = bytearray((path / "c" / "1").read_bytes())
    chunk = chunk[:16]
    chunk[2] |= 2  # stored as it is
    (path / "c" / "1").write_bytes(chunk)
    with pytest.raises(UserError, match="cannot be read at"):
        list(zarr_stream(path, 100).blocks())


def test_a_codec_that_is_not_well_known_is_refused(tmp_path: Path) -> None:
    path = array_of_ids(tmp_path / "ids")
    text = (path / "zarr.json").read_text()
    (path / "zarr.json").write_text(text.replace('"blosc"', '"numcodecs.blosc"'))
    with pytest.raises(UserError, match="is not a Zarr array that can be read"):
        zarr_stream(path, 100)
