"""The configurations of `sagsae steer` and `sagsae dial`, and the file that `dial` writes (shared/config.py says how a
schema works)."""

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from shared.config import Folder, Location
from shared.schema import Frozen, Shown

MOST_LATENT: Final = (1 << 24) - 1
GRID: Final = (-2.0, -1.0, 0.0, 1.0, 2.0)
"""The dial values at which `sagsae dial` measures a latent."""
FEWEST_CONTROLS: Final = 40
"""Control directions that a verdict needs."""
FALSE_DISCOVERIES: Final = 0.1
"""The false discovery rate at which a latent passes."""

Mode = Literal["clamp", "add", "ablate"]


def dial_numbers(value: str) -> str:
    """Refuses a text that is no list of at most 64 numbers."""
    try:
        found = [float(part) for part in value.split(",")]
    except ValueError:
        found = []
    if not 0 < len(found) <= 64 or not all(map(math.isfinite, found)):
        raise ValueError("must be at most 64 numbers with commas between them, such as -2,-1,0,1,2")
    return value


class SteerConfig(Frozen):
    """Text that the language model writes while one latent is set to other values."""

    groups: ClassVar[Mapping[str, str]] = {
        "Run": "run sae store model",
        "Intervention": "latent dial mode at",
        "Text": "prompt contexts",
        "Continuation": "new_tokens temperature seed",
        "Computation": "device",
    }

    run: Annotated[Folder, Shown(option="RUN")]
    """The training run's folder."""
    sae: str | None = None
    """The autoencoder's name in the run. Default: the only one in the run."""
    store: Location | None = None
    """Where the run's store is now. Default: where it was."""
    model: str | None = None
    """The language model. Default: the one the store was harvested from."""
    latent: Annotated[int, Field(ge=0, le=MOST_LATENT)]
    """The latent's number."""
    dial: Annotated[str, AfterValidator(dial_numbers), Shown("N,N…")] = "-2,-1,0,1,2"
    """Values to set the latent to, in dial units. Not used by --mode ablate.

    A dial unit is the 95 % quantile of |f| where the latent fires; of the weaker pole where it uses both."""
    mode: Mode = "clamp"
    """clamp: x + (v - f) d. add: x + v d. ablate: x - f d. All keep the autoencoder's error.

    f is the latent's value on the activation x, d its row of the decoder, v the value that --dial names."""
    at: Annotated[
        str, Field(pattern=r"^(all|last|[0-9]{1,9})$"), Shown("all|last|N", type="all, last or a position")
    ] = "all"
    """Positions to change: all that the run trains on, the prompt's last one, or one position from 0.

    Generated tokens belong to all, and not to last. A BOS token counts as position 0."""
    prompt: str | None = None
    """The text to continue. Default: none, with --contexts."""
    contexts: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    """Held-out contexts on which to measure the change, instead of a prompt. Default: none, with --prompt."""
    new_tokens: Annotated[int, Field(ge=1, le=4096)] = 24
    """Tokens to write after the prompt."""
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    """0: the most probable token each time. Above 0: draw tokens at this temperature.

    All dial values share the random numbers, so that only the latent makes a difference."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the drawn tokens, and of the choice of contexts."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …"""

    @property
    def values(self) -> tuple[float, ...]:
        """The dial's values, in dial units; 0 for an ablation."""
        return (0.0,) if self.mode == "ablate" else tuple(float(part) for part in self.dial.split(","))

    @model_validator(mode="after")
    def check(self) -> "SteerConfig":
        if (self.prompt is None) == (self.contexts is None):
            raise ValueError("prompt: give a text with --prompt, or a number of held-out contexts with --contexts")
        if self.contexts is not None and self.at == "last":
            raise ValueError("at: last is the last token of a prompt. With --contexts use all, or a position")
        if self.mode == "ablate" and "dial" in self.model_fields_set:
            raise ValueError("dial: is not used by --mode ablate. Leave out one of the two")
        return self


class DialConfig(Frozen):
    """The test of whether the values of latents steer the language model's next tokens, against control directions."""

    groups: ClassVar[Mapping[str, str]] = {
        "Run": "run sae store model overwrite",
        "Latents": "latents latent least seed",
        "Test": "contexts tokens controls shuffled",
        "Computation": "device",
    }

    run: Annotated[Folder, Shown(option="RUN")]
    """The training run's folder."""
    sae: str | None = None
    """The autoencoder's name in the run. Default: the only one in the run."""
    store: Location | None = None
    """Where the run's store is now. Default: where it was."""
    model: str | None = None
    """The language model. Default: the one the store was harvested from."""
    overwrite: bool = False
    """Replace the result of an earlier test of this autoencoder."""
    latents: Annotated[int, Field(ge=1, le=100_000)] = 50
    """Latents to draw at random among those that use both poles."""
    latent: tuple[Annotated[int, Field(ge=0, le=MOST_LATENT)], ...] = ()
    """A latent to test, by number. Default: draw them."""
    least: Annotated[int, Field(ge=1)] = 200
    """Firings that the rarer pole of a drawn latent needs."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the drawn latents, contexts and control directions."""
    contexts: Annotated[int, Field(ge=1, le=1 << 20)] = 16
    """Held-out contexts on which to steer."""
    tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens to read for the next-token counts, as whole contexts. Default: all that the run trained on."""
    controls: Annotated[int, Field(ge=0, le=10_000)] = FEWEST_CONTROLS
    """Control directions, shared by all latents. Fewer than 40 give no verdict."""
    shuffled: Annotated[int, Field(ge=0, le=1000)] = 8
    """Contrasts from shuffled signs for each latent."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …"""


class DialPart(BaseModel):
    """A part of dial.json: read strictly, and without NaN or infinities."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class DialControl(DialPart):
    """A control direction."""

    kind: Literal["random", "other"]
    """random: a random unit vector. other: the decoder row of a latent that is not tested."""
    latent: int | None = None
    """The latent of `other`."""
    sign: Literal[1, -1] = 1


class DialLatent(DialPart):
    """The test of one latent."""

    latent: int
    firings: tuple[int, int]
    """Below and above zero, on the rows of the next-token counts."""
    energy: float
    """The weaker pole's share of Σf², from latents.parquet; 0 for a latent with one pole."""
    unit: float
    """The value at dial 1."""
    unit_rms: float
    """`unit` over sqrt(E|x - mean|²)."""
    plus: tuple[int, ...]
    """T+: the token ids that are enriched right after the latent fires above zero."""
    minus: tuple[int, ...]
    """T-: the same below zero."""
    clean: float
    """y without an intervention."""
    y: tuple[float, ...]
    """mean log p(T+) - mean log p(T-) at each dial value."""
    kl: tuple[float, ...]
    """KL(unsteered ‖ steered) at each dial value, in nats per prediction."""
    ce: tuple[float, ...]
    """Change of the next-token loss at each dial value, in nats."""
    slope: float
    """(y(1) - y(-1)) / 2."""
    interval: tuple[float, float]
    """95 % bootstrap interval of the slope over contexts. It says how exact the slope is; it is no test."""
    controls: tuple[float, ...]
    """The slope of every control direction by the same tokens, at the same size."""
    shuffled: tuple[float, ...]
    """The latent's slope by tokens from shuffled signs."""
    shuffled_p: tuple[float, ...]
    """Their p."""
    p: float | None
    """The share of ± control slopes that are at least as large. None: there are no controls."""
    passes: bool | None
    """Whether it passes at a false discovery rate of 10 %. None: fewer than 40 controls give no verdict."""


class SkippedLatent(DialPart):
    """A latent that was asked for and cannot be tested."""

    latent: int
    reason: str


class DialSettings(DialPart):
    """What decides the result, beside the run."""

    latents: int | None
    """None: they were named."""
    latent: tuple[int, ...]
    least: int
    seed: int
    contexts: int
    tokens: int | None
    controls: int
    shuffled: int


class DialFile(DialPart):
    """The content of dial.json."""

    format: Literal[1] = 1
    sae: str
    sha256: str
    """The autoencoder's weights."""
    snapshot: str
    """The rows of the store."""
    hook: str
    model: str
    commit: str
    settings: DialSettings
    grid: tuple[float, ...]
    contexts: tuple[int, ...]
    """The held-out contexts that were steered."""
    predictions: int
    sizes: tuple[float, ...]
    """The lengths at which the control directions were measured."""
    controls: tuple[DialControl, ...]
    latents: tuple[DialLatent, ...]
    skipped: tuple[SkippedLatent, ...]
    verdict: str
    """The verdict in words."""
    seconds: float

    @property
    def share(self) -> float | None:
        """The share of the tested latents that pass; None without a verdict."""
        known = [latent.passes for latent in self.latents if latent.passes is not None]
        return sum(known) / len(known) if known else None
