"""A training run's state on disk: safetensors and JSON, no pickle. A checkpoint is a folder that is whole or absent."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from shared.errors import DamagedError
from shared.files import sync_folder, write_file

KEPT: Final = 2


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes `folder/step-NNNNNNNN`, then deletes all but the newest two."""
    folder.mkdir(parents=True, exist_ok=True)
    building = folder / f"building.{os.getpid()}"
    shutil.rmtree(building, ignore_errors=True)
    write_file(
        building / "tensors.safetensors", save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    )
    write_file(building / "state.json", json.dumps(state).encode())
    final = folder / f"step-{step:08d}"
    shutil.rmtree(final, ignore_errors=True)
    building.rename(final)
    sync_folder(folder)
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest checkpoint, or None when there is none. Raises DamagedError when it cannot be read."""
    newest = max(folder.glob("step-*"), default=None)
    if newest is None:
        return None
    try:
        return load_file(newest / "tensors.safetensors"), json.loads((newest / "state.json").read_text())
    except (OSError, SafetensorError, ValueError) as error:
        raise DamagedError(
            f"{newest}: cannot be read ({error}). Delete it to go on from the checkpoint before"
        ) from error
