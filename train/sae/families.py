"""The mathematics of every architecture, by its configuration."""

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
