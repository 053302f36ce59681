"""Finds the run, store or autoencoder in whose folder a path is."""

import os
from pathlib import Path


def owner_of(out: Path) -> str | None:
    """Returns the run, store or autoencoder's folder that the file would be in, in words; else None."""
    for folder in Path(os.path.abspath(out)).parents:
        for name, what in (("config.json", "the run"), ("zarr.json", "the store"), ("cfg.json", "the autoencoder")):
            if (folder / name).is_file() and (name != "config.json" or (folder / "record.json").is_file()):
                return f"{what} {folder}"
    return None
