"""A file with several numpy arrays: a sealed JSON header, then the bytes of each array, aligned.

It is for what the pass keeps between calls. The file is checked before anything is allocated: it can come from anybody.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shared.errors import DamagedError
from shared.files.handles import Buffer
from shared.files.local import write_file
from shared.gate import BadData, members, parse_json
from shared.store.shard import crc32c
from shared.store.spec import is_sealed, seal

ALIGNED: Final = 64
MOST_HEADER: Final = 1 << 20
TYPES: Final = ("<i8", "<i4", "<u4", "<u2", "<f8", "<f4", "<f2")
Arrays = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class ArrayFile:
    """The content of a file."""

    about: dict[str, Any]
    arrays: dict[str, NDArray[np.generic]]
    """Mapped into memory, not read."""


def write_arrays(path: Path, about: dict[str, Any], arrays: Arrays) -> None:
    """Writes the file whole or not at all."""
    write_file(path, pieces_of(about, {name: np.ascontiguousarray(array) for name, array in arrays.items()}))


def pieces_of(about: dict[str, Any], arrays: Arrays) -> Iterator[Buffer]:
    entries = [
        [name, array.dtype.newbyteorder("<").str, list(array.shape), crc32c(bytes_of(array))]
        for name, array in arrays.items()
    ]
    text = json.dumps(seal({"about": about, "arrays": entries})).encode()
    text += b" " * (-(len(text) + 8) % ALIGNED)
    yield len(text).to_bytes(8, "little") + text
    for array in arrays.values():
        yield bytes_of(array)
        yield bytes(-array.nbytes % ALIGNED)


def bytes_of(array: NDArray[np.generic]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def read_arrays(path: Path) -> ArrayFile:
    """Maps the arrays of a file into memory. Raises DamagedError when it was cut or altered."""
    try:
        return mapped(path)
    except (BadData, OSError) as error:
        raise DamagedError(f"{path}: {error}. Start again with: sagsae features --overwrite") from error


def mapped(path: Path) -> ArrayFile:
    """Like `read_arrays`, but raises BadData."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MOST_HEADER:
            raise BadData("is no file of this program")
        header = parse_json(file.read(length), MOST_HEADER)
    if not isinstance(header, dict) or not is_sealed(header):
        raise BadData("was altered: the checksum of its header does not match")
    found = members(header, ("about", "arrays"), ("about", "arrays", "crc32c"))
    at, arrays, size = 8 + length, {}, path.stat().st_size
    for entry in found["arrays"]:
        name, kind, shape, crc = checked_entry(entry)
        count = math.prod(shape)
        if at + count * kind.itemsize > size:
            raise BadData("was cut")
        array = np.memmap(path, kind, "r", at, tuple(shape)) if count else np.empty(shape, kind)
        if crc32c(bytes_of(array)) != crc:
            raise BadData(f"was altered: the checksum of {name} does not match")
        arrays[name] = array
        at += count * kind.itemsize + -count * kind.itemsize % ALIGNED
    return ArrayFile(dict(found["about"]), arrays)


def checked_entry(entry: Any) -> tuple[str, np.dtype[Any], list[int], int]:
    """Name, data type, shape and checksum of an array. Raises BadData."""
    try:
        name, kind, shape, crc = entry
        sound = kind in TYPES and isinstance(name, str) and isinstance(crc, int)
        sound = sound and len(shape) <= 3 and all(type(n) is int and 0 <= n < 1 << 44 for n in shape)
    except (TypeError, ValueError):
        sound = False
    if not sound:
        raise BadData("describes an impossible array")
    return name, np.dtype(kind), shape, crc
