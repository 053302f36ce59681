"""The configuration of `sagsae features` (shared/config.py says how a schema works)."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from shared.config import Folder, Location
from shared.schema import Frozen, Shown


class FeaturesConfig(Frozen):
    """One pass over a store that finds what every latent of an autoencoder fires on: one of a run, or one that stands
    alone."""

    groups: ClassVar[Mapping[str, str]] = {
        "Run": "run sae store model overwrite",
        "Autoencoder without a run": "hook transfer out",
        "Rows": "tokens cofire_every",
        "Examples": "top drawn",
        "Computation": "device",
    }

    run: Annotated[Folder, Shown(option="RUN")] | None = None
    """The training run's folder. Default: none, with --sae FOLDER."""
    sae: str | None = None
    """The autoencoder's name in the run; without RUN its folder, trained here or imported. Default: the only one."""
    store: Location | None = None
    """Where the run's store is now; without RUN the store to read. Default: where it was."""
    model: str | None = None
    """The language model, for the logit lens. Default: the one the store was harvested from.

    Two tensors of its weights are read; no forward pass is made, and nothing is downloaded."""
    tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens to read, from the beginning of the store, as whole contexts. Default: all that the run read."""
    top: Annotated[int, Field(ge=1, le=256)] = 16
    """Strongest contexts to keep for each pole."""
    drawn: Annotated[int, Field(ge=0, le=1024)] = 32
    """Firings to draw uniformly at random for each pole."""
    cofire_every: Annotated[int, Field(ge=1)] | None = None
    """Count what fires together on every n-th token. Default: 8, or more where that would count 10^8 pairs."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …"""
    overwrite: bool = False
    """Replace what an earlier call wrote for this autoencoder."""
    hook: str | None = None
    """Without RUN, the hookpoint to read. Default: the only one in the store."""
    transfer: bool = False
    """Without RUN, take an autoencoder that was made for another model or hookpoint of the same width."""
    out: Folder | None = None
    """Without RUN, the folder to write. Default: RUN/features/NAME."""

    @model_validator(mode="after")
    def check_what(self) -> "FeaturesConfig":
        if self.run is not None:
            for key in ("hook", "transfer", "out"):
                if key in self.model_fields_set:
                    raise ValueError(f"--{key}: is for an autoencoder without a run; a run says it by itself")
        elif lacking := [f"--{key}" for key in ("sae", "store", "out") if getattr(self, key) is None]:
            raise ValueError(
                "RUN: name a run, or an autoencoder, a store and a folder for the result: --sae FOLDER --store STORE "
                f"--out DIR ({', '.join(lacking)} is missing)"
            )
        return self
