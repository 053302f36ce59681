"""Arrays of ids whose chunks say more than they hold."""

import json
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
    chunk[12:16] = (int.from_bytes(chunk[4:8], "little") + 16).to_bytes(4, "little")  # as long as a stored one is
    (path / "c" / "1").write_bytes(chunk)
    with pytest.raises(UserError, match="cannot be read at"):
        list(zarr_stream(path, 100).blocks())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_codec_that_is_not_well_known_is_refused(tmp_path: Path) -> None:
    """Any codec that was installed was loaded, with its own blosc, to which nobody says how long a chunk is."""
    path = array_of_ids(tmp_path / "ids")
    document = json.loads((path / "zarr.json").read_text())
    settings = {"cname": "zstd", "clevel": 5, "shuffle": 1, "blocksize": 0}
    document["codecs"][-1] = {"name": "numcodecs.blosc", "configuration": settings}
    (path / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="is not a Zarr array that can be read"):
        zarr_stream(path, 100)
