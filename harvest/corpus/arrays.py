"""Corpora that are arrays of token ids: a .npy file, or a folder that is a Zarr v3 array, read block by block.

An array [n] is one stream that is already joined; [rows, width] are rows of a context, used as they are. The
boundaries of documents are unknown, so an id that the model does not know is always refused.
"""

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from harvest.corpus.documents import Corpus, Ids, JoinedIds, StopCheck, cause, never_stop, unknown_id
from harvest.corpus.folder import all_below, file_identities
from harvest.corpus.raw_bytes import check_regular, reading
from shared.errors import UserError
from shared.files.local import read_whole
from shared.gate import members, parse_json

BLOCK_IDS: Final = 1 << 20
"""Ids read at a time, approximately."""
MAX_METADATA_BYTES: Final = 1 << 20
"""Largest description of an array, in bytes."""
MAX_CHUNK_IDS: Final = 1 << 27
"""Largest chunk, in ids; a chunk is read whole."""


def numpy_stream(path: Path, vocab_size: int, check_stop: StopCheck = never_stop) -> JoinedIds:
    """The ids of a .npy file, which is memory-mapped, not loaded. Raises UserError for any other content."""
    try:
        with reading(path):
            check_regular(path)
            array = np.lib.format.open_memmap(path, mode="r")  # cannot hold pickled objects
    except UserError:
        raise
    except Exception as error:  # the header is a Python literal, which can raise almost any exception
        raise UserError(
            f"corpus {path}: is not a .npy file of numbers ({cause(error)}); write it again with numpy.save"
        ) from error
    return _stream(path, array, 1, file_identities([path], path.parent, check_stop)[0], vocab_size)


def zarr_stream(path: Path, vocab_size: int, check_stop: StopCheck = never_stop) -> JoinedIds:
    """The ids of a folder that is a Zarr v3 array. Raises UserError for a group, which holds arrays."""
    import zarr

    from shared.store.foreign import check_document, checked_codecs

    try:
        document = members(parse_json(read_whole(path / "zarr.json", MAX_METADATA_BYTES)), ("codecs",), None)
        check_document(document, 1)
        with checked_codecs():
            array = zarr.open_array(str(path), mode="r", zarr_format=3)
    except Exception as error:  # a group, unknown codecs and bad metadata share no other base
        raise UserError(
            f"corpus {path}: is not a Zarr array that can be read ({cause(error)}); give the folder of one array of ids"
        ) from error
    return _stream(path, array, array.chunks[0] if array.ndim else 1, _folder_described(path, check_stop), vocab_size)


def _folder_described(path: Path, check_stop: StopCheck) -> dict[str, Any]:
    """One identity for all files of a folder: a hash of their names and bytes, of fixed size."""
    digest, size = hashlib.blake2b(digest_size=16), 0
    for file in file_identities(sorted(all_below(path)), path, check_stop):
        digest.update(f"{file['name']} {file['bytes']} {file['blake2b']}\n".encode())
        size += file["bytes"]
    return {"name": path.resolve().name, "bytes": size, "blake2b": digest.hexdigest()}


def _stream(path: Path, array: Any, chunk: int, identity: dict[str, Any], vocab_size: int) -> JoinedIds:
    if array.dtype.kind not in "iu":
        raise UserError(f"corpus {path}: is an array of {array.dtype}; whole numbers, the ids of tokens, are expected")
    if array.ndim not in (1, 2):
        raise UserError(
            f"corpus {path}: is an array of {array.ndim} dimensions; [ids] (one stream) or [rows, context] is expected"
        )
    width = int(array.shape[1]) if array.ndim == 2 else None
    if (whole := min(chunk, int(array.shape[0])) * (width or 1)) > MAX_CHUNK_IDS:
        raise UserError(
            f"corpus {path}: its chunks have {whole:,} ids each; write it in smaller chunks, of about 1 million ids"
        )
    description = {"kind": "ids", **identity, "shape": list(array.shape), "dtype": str(array.dtype)}
    return JoinedIds(description, functools.partial(_blocks, path, array, chunk, vocab_size), width)


def _blocks(path: Path, array: Any, chunk: int, vocab_size: int) -> Iterator[Ids]:
    """The ids in order, flat, in whole chunks. Raises UserError at an id outside 0 to vocab_size - 1."""
    step = chunk * max(1, BLOCK_IDS // max(1, chunk * int(np.prod(array.shape[1:]))))
    for start in range(0, array.shape[0], step):
        try:
            block = np.asarray(array[start : start + step])
        except Exception as error:  # codecs and checksums fail in many types
            raise UserError(f"corpus {path}: cannot be read at {start} ({cause(error)}); write it again") from error
        outside = np.argwhere((block < 0) | (block >= vocab_size))
        if len(outside):
            first = tuple(outside[0].tolist())
            place = f"position {start + first[0]}" + (f", {first[1]}" if block.ndim == 2 else "")
            raise UserError(unknown_id(int(block[first]), f"corpus {path}, {place}", vocab_size))
        yield _flat(block)


def _flat(block: NDArray[Any]) -> Ids:
    return block.astype(np.int64).reshape(-1)


def takes_rows(corpus: Corpus | JoinedIds, context: int, bos: str) -> bool:
    """Whether the corpus consists of rows that are used as they are. Raises UserError when they do not fit the
    settings."""
    if isinstance(corpus, Corpus) or corpus.width is None:
        return False
    if corpus.width != context:
        raise UserError(
            f"--context {context}: the corpus is an array with rows of {corpus.width} ids, which are used as they "
            f"are. Use --context {corpus.width}, or give the ids as one stream, an array of one dimension"
        )
    if bos == "true":
        raise UserError(
            "bos: the corpus is an array whose rows are used as they are, so no BOS can be added. Leave bos at auto, "
            "or give the ids as one stream, an array of one dimension"
        )
    return True
