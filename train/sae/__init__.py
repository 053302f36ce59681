"""The autoencoders: mathematics only. One file an architecture family; none of them knows ranks or files."""

from pathlib import Path
from typing import Any

from shared.saes import Gated, JumpRelu, Relu, SAEConfig, SaGsae, TopK
from train.sae.base import Family
from train.sae.gated import GatedFamily
from train.sae.relu import JumpReluFamily, ReluFamily
from train.sae.topk import TopKFamily


def family(config: SAEConfig) -> Family[Any]:
    """The mathematics of a configuration."""
    match config:
        case SaGsae() | Gated():
            return GatedFamily(config)
        case Relu():
            return ReluFamily(config)
        case JumpRelu():
            return JumpReluFamily(config)
        case TopK():
            return TopKFamily(config)
    raise TypeError(f"{type(config).__name__}: no architecture is known by this configuration")


def load(folder: str | Path, device: str = "cpu") -> Any:
    """A trained autoencoder from its folder: an `Autoencoder` (train/autoencoder.py), for raw activations."""
    from train.autoencoder import Autoencoder

    return Autoencoder.load(folder, device)
