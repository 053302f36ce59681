"""The configuration of `sagsae view`, and what its page may ask for (shared/config.py says how a schema works)."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from shared.config import Folder, Location
from shared.schema import Frozen, Shown
from shared.schemas.steer import MOST_LATENT, Mode

MOST_NEW_TOKENS: Final = 256
"""Tokens that one request may have written."""
MOST_CHARACTERS: Final = 20_000
"""Characters of a prompt, or of a text to encode."""
MOST_DIAL: Final = 100.0
"""Dial units, to both sides of zero."""


class ViewConfig(Frozen):
    """The page of the latents on this machine's loopback address, with the language model behind it."""

    groups: ClassVar[Mapping[str, str]] = {
        "Run": "run sae store",
        "Language model": "no_model model device",
        "Server": "port",
    }

    run: Annotated[Folder, Shown(option="RUN")]
    """The training run's folder, or the folder of one page, RUN/features/NAME."""
    sae: str | None = None
    """The autoencoder's name in the run. Default: the only one that `sagsae features` has counted."""
    store: Location | None = None
    """Where the run's store is now. Default: where it was."""
    no_model: bool = False
    """Load no language model: the page then shows what was counted, and nothing live."""
    model: str | None = None
    """The language model. Default: the one the store was harvested from."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …"""
    port: Annotated[int, Field(ge=0, le=65_535)] = 0
    """The port on 127.0.0.1. 0: any free one, which is printed."""


class SteerQuestion(Frozen):
    """The body of POST /api/steer."""

    latent: Annotated[int, Field(ge=0, le=MOST_LATENT)]
    dial: Annotated[float, Field(ge=-MOST_DIAL, le=MOST_DIAL)] = 0.0
    """Dial units. Not used with mode ablate."""
    mode: Mode = "clamp"
    at: Literal["all", "last"] = "all"
    """All positions that the run trains on, or the prompt's last one."""
    prompt: Annotated[str, Field(min_length=1, max_length=MOST_CHARACTERS)]
    new_tokens: Annotated[int, Field(ge=1, le=MOST_NEW_TOKENS)] = 64
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    seed: Annotated[int, Field(ge=0)] = 0


class EncodeQuestion(Frozen):
    """The body of POST /api/encode."""

    text: Annotated[str, Field(min_length=1, max_length=MOST_CHARACTERS)]
    top: Annotated[int, Field(ge=1, le=128)] = 32
    """Latents to return for each token, at most: those of the largest magnitude."""
