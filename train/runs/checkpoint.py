"""Reads and writes a run's checkpoints: folders of safetensors and JSON, no pickle, each complete or absent.

Each rank that trains its own autoencoders writes one part; rank 0 completes the folder. state.json holds its own
checksum and the BLAKE2b of each part, so that an altered checkpoint is detected before anything is loaded from it. The
run then resumes from the checkpoint before it.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import DamagedError
from shared.files.handles import Buffer, open_to_read
from shared.files.local import read_whole, sync, write_file
from shared.gate import MOST, SMALL, BadData, members, parse_json, quoted
from shared.record import sealed_json
from shared.store.spec import is_sealed

VERSION: Final = 4
KEPT: Final = 2
BUILDING: Final = "building"
DAMAGED: Final = "damaged."
"""Prefix of the name of a checkpoint that could not be used."""
STEP: Final = re.compile(r"step-[0-9]{8,12}")
MOST_HEADER: Final = SMALL
"""Maximum bytes of the header that describes a file's tensors."""
REPLACED: Final = "replaced."
"""Prefix of the name of a checkpoint while one of the same step replaces it."""
READ_AT_ONCE: Final = 1 << 22
TYPES: Final = {torch.float32: "F32", torch.int64: "I64", torch.uint8: "U8", torch.bool: "BOOL"}
"""The data types of checkpoint tensors, with their names in safetensors."""


def begin_checkpoint(folder: Path) -> None:
    """Creates the empty folder in which the next checkpoint is built."""
    shutil.rmtree(folder / BUILDING, ignore_errors=True)
    (folder / BUILDING).mkdir(parents=True)


def save_part(folder: Path, rank: int, tensors: dict[str, Tensor]) -> str:
    """Writes one rank's tensors and returns the file's BLAKE2b."""
    digest = hashlib.blake2b(digest_size=16)
    write_file(folder / BUILDING / part_name(rank), digested(pieces(tensors), digest))
    return digest.hexdigest()


def part_name(rank: int) -> str:
    return f"tensors-{rank:04d}.safetensors"


def digested(pieces: Iterable[Buffer], digest: Any) -> Iterator[Buffer]:
    for piece in pieces:
        digest.update(piece)
        yield piece


def pieces(tensors: Mapping[str, Tensor]) -> Iterator[Buffer]:
    """Yields a safetensors file, one tensor after another. The library's own `save` builds the whole file in memory,
    twice."""
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # so that each is aligned
    header: dict[str, Any] = {}
    start = 0
    for name, tensor in ordered:
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_tensors(data: NDArray[np.uint8], types: Mapping[torch.dtype, str] = TYPES) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file as views of `data`. The file must hold only the data types in `types`,
    packed without gaps to its end, as `pieces` and the safetensors library write it. Raises BadData for anything else,
    before anything is allocated."""
    length = int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or length > min(MOST_HEADER, len(data) - 8):
        raise BadData("is cut short, or is not a safetensors file")
    header = parse_json(data[8 : 8 + length].tobytes(), MOST_HEADER)
    if not isinstance(header, dict):
        raise BadData(f"has the header {quoted(header)}, which is not an object")
    header.pop("__metadata__", None)
    body, expected, tensors = data[8 + length :], 0, {}
    entries = [(name, *tensor_entry(name, entry, types)) for name, entry in header.items()]
    for name, dtype, shape, begin, end in sorted(entries, key=lambda entry: entry[3:]):
        if begin != expected or end - begin != math.prod(shape) * dtype.itemsize or end > len(body):
            raise BadData(f"has an impossible place of its tensor {quoted(name)}")
        part = body[begin:end] if body[begin:end].ctypes.data % dtype.itemsize == 0 else body[begin:end].copy()
        tensors[name] = torch.from_numpy(part).view(dtype).view(shape)
        expected = end
    if expected != len(body):
        raise BadData(f"has {len(body) - expected:,} bytes after its last tensor")
    return tensors


def tensor_entry(
    name: str, entry: Any, types: Mapping[torch.dtype, str] = TYPES
) -> tuple[torch.dtype, list[int], int, int]:
    """Returns the data type, shape, first byte and end of a tensor. Raises BadData."""
    entry = members(entry, ("dtype", "shape", "data_offsets"))
    dtype = next((dtype for dtype, known in types.items() if known == entry["dtype"]), None)
    if dtype is None:
        raise BadData(
            f"has its tensor {quoted(name)} in the type {quoted(entry['dtype'])} instead of {', '.join(types.values())}"
        )
    shape, place = entry["shape"], entry["data_offsets"]
    if not (isinstance(shape, list) and isinstance(place, list) and len(shape) <= 4 and len(place) == 2):
        raise BadData(f"has an invalid shape or place of its tensor {quoted(name)}")
    if not all(type(number) is int and 0 <= number < MOST for number in (*shape, *place)):
        raise BadData(f"has an invalid shape or place of its tensor {quoted(name)}")
    return dtype, shape, place[0], place[1]


def end_checkpoint(folder: Path, number: int, state: dict[str, Any]) -> None:
    """Completes the checkpoint as `folder/step-NNNNNNNN` and deletes all but the newest two. `number` must rise from
    one checkpoint to the next. A failure at any moment leaves the earlier checkpoints complete."""
    write_file(folder / BUILDING / "state.json", sealed_json(state))
    final = folder / f"step-{number:08d}"
    before = folder / f"{REPLACED}{final.name}"
    if final.exists():
        final.rename(before)
    (folder / BUILDING).rename(final)
    sync(folder)
    shutil.rmtree(before, ignore_errors=True)
    for old in newest_first(folder)[KEPT:]:
        shutil.rmtree(old)


def tidy(folder: Path) -> None:
    """Cleans up after a killed process: deletes the unfinished checkpoint and restores one that was being replaced."""
    shutil.rmtree(folder / BUILDING, ignore_errors=True)
    for before in folder.glob(f"{REPLACED}step-*"):
        final = before.with_name(before.name.removeprefix(REPLACED))
        if final.exists():
            shutil.rmtree(before)
        else:
            before.rename(final)


def newest_first(folder: Path) -> list[Path]:
    """Returns the folders of all checkpoints, the newest first."""
    found = [path for path in folder.glob("step-*") if STEP.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Returns the newest checkpoint and its state.json, or None when there is none. Raises DamagedError when it cannot
    be read or was altered."""
    found = newest_first(folder)
    return (found[0], read_state(found[0])) if found else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Returns state.json after checking it and all parts against their checksums. A checkpoint of an earlier version of
    sagsae has no checksums. Raises DamagedError when a file cannot be read or was altered."""
    try:
        state = parse_json(read_whole(checkpoint / "state.json", SMALL))
        if not isinstance(state, dict):
            raise BadData(f"state.json is {quoted(state)} instead of an object")
        if state.get("version") != VERSION and "version" in state:
            return state
        if "crc32c" in state and not is_sealed(state):
            raise BadData("state.json was altered: its checksum does not match")
        for rank, digest in enumerate(state.get("blake2b") or ()):
            if blake2b_of(checkpoint / part_name(rank)) != digest:
                raise BadData(f"{part_name(rank)} was altered: its BLAKE2b does not match")
    except (OSError, BadData, DamagedError) as error:
        raise damaged(checkpoint, error) from error
    return {key: value for key, value in state.items() if key != "crc32c"}


def blake2b_of(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(open_to_read(path)[0], "rb", buffering=0) as file:
        while block := file.read(READ_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def set_aside(checkpoint: Path) -> None:
    """Renames a damaged checkpoint so that no run resumes from it."""
    aside = checkpoint.with_name(DAMAGED + checkpoint.name)
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    sync(checkpoint.parent)


def load_tensors(checkpoint: Path, parts: int) -> dict[str, Tensor]:
    """Returns the tensors of all parts by name. Raises DamagedError when a part cannot be read."""
    try:
        loaded = [read_tensors(mapped(checkpoint / part_name(rank))) for rank in range(parts)]
    except (OSError, BadData) as error:
        raise damaged(checkpoint, error) from error
    return {name: tensor for part in loaded for name, tensor in part.items()}


def mapped(path: Path) -> NDArray[np.uint8]:
    """Maps a file into memory. Raises BadData when it is missing or empty."""
    if not path.is_file() or not path.stat().st_size:
        raise BadData(f"{path.name} is missing or empty")
    return np.memmap(path, np.uint8, "c")


def damaged(checkpoint: Path, error: Exception) -> DamagedError:
    return DamagedError(f"{checkpoint}: cannot be read ({error})")
