"""The mathematics of every architecture, by its configuration."""

from importlib import import_module
from typing import Any

from shared.saes import ARCHITECTURES, SAEConfig
from train.sae.base import Family


def family(config: SAEConfig) -> Family[Any]:
    """The mathematics of a configuration. Raises TypeError for an architecture that has no entry."""
    if config.arch not in ARCHITECTURES:
        raise TypeError(f"{config.arch}: no architecture is known by this name")
    module, _, name = ARCHITECTURES[config.arch].family.partition(":")
    mathematics: Family[Any] = getattr(import_module(module), name)(config)
    return mathematics
