"""Stage two: trains sparse autoencoders from an activation store, evaluates them and writes a report."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train.autoencoder import Autoencoder


def load(folder: str | Path, device: str = "cpu") -> "Autoencoder":
    """Loads an autoencoder from its folder, trained here or imported, as a torch module that takes raw activations
    [n, d_in] (train/autoencoder.py). Its parameters do not ask for gradients. Raises UserError when the folder holds
    none, DamagedError when it was altered."""
    from train.autoencoder import Autoencoder

    return Autoencoder.load(folder, device)
