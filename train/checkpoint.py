"""A training run's state on disk: safetensors and JSON, no pickle. A checkpoint is a folder that is whole or absent.

Each rank that trains autoencoders of its own writes a part; the leading one makes the folder whole.
"""

import json
import shutil
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from shared.errors import DamagedError
from shared.files import sync_folder, write_file

KEPT: Final = 2
BUILDING: Final = "building"


def begin_checkpoint(folder: Path) -> None:
    """Makes room for a new one."""
    shutil.rmtree(folder / BUILDING, ignore_errors=True)
    (folder / BUILDING).mkdir(parents=True)


def save_part(folder: Path, rank: int, tensors: dict[str, Tensor]) -> None:
    data = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    write_file(folder / BUILDING / f"tensors-{rank:04d}.safetensors", data)


def end_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """`folder/step-NNNNNNNN` is there; then all but the newest two are deleted."""
    write_file(folder / BUILDING / "state.json", json.dumps(state).encode())
    final = folder / f"step-{step:08d}"
    shutil.rmtree(final, ignore_errors=True)
    (folder / BUILDING).rename(final)
    sync_folder(folder)
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest checkpoint, or None when there is none. Raises DamagedError when it cannot be read."""
    newest = max(folder.glob("step-*"), default=None)
    if newest is None:
        return None
    try:
        state = json.loads((newest / "state.json").read_text())
        parts = [load_file(newest / f"tensors-{rank:04d}.safetensors") for rank in range(state["parts"])]
        return {name: tensor for part in parts for name, tensor in part.items()}, state
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(
            f"{newest}: cannot be read ({error}). Delete it to go on from the checkpoint before"
        ) from error
