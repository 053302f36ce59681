"""The configuration of `sagsae features` (shared/config.py says how a schema works)."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field

from shared.config import Folder, Location
from shared.schema import Frozen, Shown


class FeaturesConfig(Frozen):
    """One pass over a run's store that finds what every latent of an autoencoder fires on."""

    groups: ClassVar[Mapping[str, str]] = {
        "Run": "run sae store model overwrite",
        "Rows": "tokens cofire_every",
        "Examples": "top drawn",
        "Computation": "device",
    }

    run: Annotated[Folder, Shown(option="RUN")]
    """The training run's folder."""
    sae: str | None = None
    """The autoencoder's name in the run. Default: the only one in the run."""
    store: Location | None = None
    """Where the run's store is now. Default: where it was."""
    model: str | None = None
    """The language model, for the logit lens. Default: the one the store was harvested from.

    Two tensors of its weights are read; no forward pass is made, and nothing is downloaded."""
    tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens to read, from the beginning of the store, as whole contexts. Default: all that the run read."""
    top: Annotated[int, Field(ge=1, le=256)] = 16
    """Strongest contexts to keep for each pole."""
    drawn: Annotated[int, Field(ge=0, le=1024)] = 12
    """Firings to draw uniformly at random for each pole."""
    cofire_every: Annotated[int, Field(ge=1)] | None = None
    """Count what fires together on every n-th token. Default: 8, or more where that would count 10^8 pairs."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …"""
    overwrite: bool = False
    """Replace what an earlier call wrote for this autoencoder."""
