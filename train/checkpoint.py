"""A training run's state on disk: safetensors and JSON, no pickle. A checkpoint is a folder that is whole or absent.

Each rank that trains autoencoders of its own writes a part; the leading one makes the folder whole.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shared.errors import DamagedError
from shared.files import Buffer, sync, write_file

KEPT: Final = 2
BUILDING: Final = "building"
TYPES: Final = {torch.float32: "F32", torch.int64: "I64", torch.uint8: "U8", torch.bool: "BOOL"}
"""What a state is made of, by safetensors' names."""


def begin_checkpoint(folder: Path) -> None:
    """Makes room for a new one."""
    shutil.rmtree(folder / BUILDING, ignore_errors=True)
    (folder / BUILDING).mkdir(parents=True)


def save_part(folder: Path, rank: int, tensors: dict[str, Tensor]) -> None:
    write_file(folder / BUILDING / f"tensors-{rank:04d}.safetensors", pieces(tensors))


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


def end_checkpoint(folder: Path, number: int, state: dict[str, Any]) -> None:
    """`folder/step-NNNNNNNN` is there; then all but the newest two are deleted. `number` grows from one to the next."""
    write_file(folder / BUILDING / "state.json", json.dumps(state).encode())
    final = folder / f"step-{number:08d}"
    shutil.rmtree(final, ignore_errors=True)
    (folder / BUILDING).rename(final)
    sync(folder)
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint and its state.json, or None when there is none. Raises DamagedError when it cannot be
    read."""
    found = max(folder.glob("step-*"), default=None)
    if found is None:
        return None
    try:
        return found, json.loads((found / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise damaged(found, error) from error


def load_tensors(checkpoint: Path, parts: int) -> dict[str, Tensor]:
    """Of all parts. Raises DamagedError when one cannot be read."""
    try:
        loaded = [load_file(checkpoint / f"tensors-{rank:04d}.safetensors") for rank in range(parts)]
    except (OSError, SafetensorError, ValueError) as error:
        raise damaged(checkpoint, error) from error
    return {name: tensor for part in loaded for name, tensor in part.items()}


def damaged(checkpoint: Path, error: Exception) -> DamagedError:
    return DamagedError(f"{checkpoint}: cannot be read ({error}). Delete it to go on from the checkpoint before")
