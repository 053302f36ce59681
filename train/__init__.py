"""Stage two: an activation store in, trained sparse autoencoders, their evaluation and a report out."""

from pathlib import Path
from typing import Any


def load(folder: str | Path, device: str = "cpu") -> Any:
    """A trained autoencoder from its folder: an `Autoencoder` (train/autoencoder.py), for raw activations."""
    from train.autoencoder import Autoencoder

    return Autoencoder.load(folder, device)
