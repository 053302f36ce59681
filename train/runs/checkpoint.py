"""A training run's state on disk: safetensors and JSON, no pickle. A checkpoint is a folder that is whole or absent.

Each rank that trains autoencoders of its own writes a part; the leading one makes the folder whole. state.json carries
a checksum of itself and the BLAKE2b of each part: a checkpoint that was altered is told from a whole one before
anything is taken from it, and the one before it is used.
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
"""Before the name of a checkpoint that could not be used."""
STEP: Final = re.compile(r"step-[0-9]{8,12}")
MOST_HEADER: Final = SMALL
"""Bytes that describe the tensors of a file."""
REPLACED: Final = "replaced."
"""Before the name of a checkpoint that is about to be replaced by one of the same step."""
READ_AT_ONCE: Final = 1 << 22
TYPES: Final = {torch.float32: "F32", torch.int64: "I64", torch.uint8: "U8", torch.bool: "BOOL"}
"""What a state is made of, by safetensors' names."""


def begin_checkpoint(folder: Path) -> None:
    """Makes room for a new one."""
    shutil.rmtree(folder / BUILDING, ignore_errors=True)
    (folder / BUILDING).mkdir(parents=True)


def save_part(folder: Path, rank: int, tensors: dict[str, Tensor]) -> str:
    """Gives its BLAKE2b, worked out while it is written."""
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
    """A safetensors file, one tensor after another. The library's own `save` makes the whole file in memory, twice: as
    much again as the states of all autoencoders, and more."""
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # each then begins where it may
    header: dict[str, Any] = {}
    at = 0
    for name, tensor in ordered:
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_tensors(data: NDArray[np.uint8]) -> dict[str, Tensor]:
    """A file that `pieces`, or the safetensors library, wrote of the types that states have: tensors that follow one
    another to its end. They lie in `data`. Raises BadData for anything else, before anything is allocated."""
    length = int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or length > min(MOST_HEADER, len(data) - 8):
        raise BadData("is cut short, or no safetensors file")
    header = parse_json(data[8 : 8 + length].tobytes(), MOST_HEADER)
    if not isinstance(header, dict):
        raise BadData(f"has {quoted(header)} for a header")
    header.pop("__metadata__", None)
    body, at, tensors = data[8 + length :], 0, {}
    entries = [(name, *tensor_entry(name, entry)) for name, entry in header.items()]
    for name, dtype, shape, begin, end in sorted(entries, key=lambda entry: entry[3:]):
        if begin != at or end - begin != math.prod(shape) * dtype.itemsize or end > len(body):
            raise BadData(f"has its tensor {quoted(name)} in a place where it cannot be")
        part = body[begin:end] if body[begin:end].ctypes.data % dtype.itemsize == 0 else body[begin:end].copy()
        tensors[name] = torch.from_numpy(part).view(dtype).view(shape)
        at = end
    if at != len(body):
        raise BadData(f"has {len(body) - at:,} bytes after its last tensor")
    return tensors


def tensor_entry(name: str, entry: Any) -> tuple[torch.dtype, list[int], int, int]:
    """Type, shape, begin and end. Raises BadData."""
    entry = members(entry, ("dtype", "shape", "data_offsets"))
    dtype = next((dtype for dtype, known in TYPES.items() if known == entry["dtype"]), None)
    if dtype is None:
        raise BadData(
            f"has its tensor {quoted(name)} in {quoted(entry['dtype'])} instead of {', '.join(TYPES.values())}"
        )
    shape, place = entry["shape"], entry["data_offsets"]
    if not (isinstance(shape, list) and isinstance(place, list) and len(shape) <= 4 and len(place) == 2):
        raise BadData(f"has its tensor {quoted(name)} in a shape or a place that is none")
    if not all(type(number) is int and 0 <= number < MOST for number in (*shape, *place)):
        raise BadData(f"has its tensor {quoted(name)} in a shape or a place that is none")
    return dtype, shape, place[0], place[1]


def end_checkpoint(folder: Path, number: int, state: dict[str, Any]) -> None:
    """`folder/step-NNNNNNNN` is there; then all but the newest two are deleted. `number` grows from one to the next.
    Whatever fails, and whenever, a checkpoint that was there before is whole."""
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
    """After a process was killed: what was being written goes, and what was about to be replaced is there again."""
    shutil.rmtree(folder / BUILDING, ignore_errors=True)
    for before in folder.glob(f"{REPLACED}step-*"):
        final = before.with_name(before.name.removeprefix(REPLACED))
        if final.exists():
            shutil.rmtree(before)
        else:
            before.rename(final)


def newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if STEP.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint and its state.json, or None when there is none. Raises DamagedError when it cannot be
    read, or a part of it is not what was written."""
    found = newest_first(folder)
    return (found[0], read_state(found[0])) if found else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json, once its parts were compared with what it says of them. Raises DamagedError. One that an earlier
    sagsae wrote has no checksums."""
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
                raise BadData(f"{part_name(rank)} is not what was written (another BLAKE2b)")
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
    """Nothing goes on from it any more."""
    aside = checkpoint.with_name(DAMAGED + checkpoint.name)
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    sync(checkpoint.parent)


def load_tensors(checkpoint: Path, parts: int) -> dict[str, Tensor]:
    """Of all parts. Raises DamagedError when one cannot be read."""
    try:
        loaded = [read_tensors(mapped(checkpoint / part_name(rank))) for rank in range(parts)]
    except (OSError, BadData) as error:
        raise damaged(checkpoint, error) from error
    return {name: tensor for part in loaded for name, tensor in part.items()}


def mapped(path: Path) -> NDArray[np.uint8]:
    """The file's bytes, read when they are used. Raises BadData for an empty one."""
    if not path.is_file() or not path.stat().st_size:
        raise BadData(f"{path.name} is missing or empty")
    return np.memmap(path, np.uint8, "c")


def damaged(checkpoint: Path, error: Exception) -> DamagedError:
    return DamagedError(f"{checkpoint}: cannot be read ({error})")
