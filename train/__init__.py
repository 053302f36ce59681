"""Stage two: trains sparse autoencoders from an activation store, evaluates them and writes a report."""

from pathlib import Path
from typing import Any


def load(folder: str | Path, device: str = "cpu") -> Any:
    """Loads a trained autoencoder from its folder and returns an `Autoencoder` (train/autoencoder.py), which takes raw
    activations. Raises UserError when the folder holds none, DamagedError when it was altered."""
    from train.autoencoder import Autoencoder

    return Autoencoder.load(folder, device)
