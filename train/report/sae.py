"""One autoencoder as `sagsae eval` measured it, and what it may be compared with."""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, field_validator

from shared.command.tables import variant
from shared.saes import ARCHITECTURES


class Deciles(BaseModel):
    """Values of ten equal parts of the live latents, from the most to the least active part."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    bipolar: tuple[float | None, ...]
    bipolar_mass: tuple[float | None, ...]


class Census(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    deciles: Deciles


class Directions(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    latents: int
    antipodal_pairs: int
    sampled: int | None = None


class ImportSource(BaseModel):
    """Which tool's files an imported autoencoder was read from."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    tool: str
    source: str


class Purpose(BaseModel):
    """What an autoencoder was made for, as its cfg.json says. None: not known."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: str | None
    hook_name: str | None


@dataclass(frozen=True, order=True)
class FrontierKey:
    """What autoencoders of one frontier have in common: they differ in λ (or k, or L0 target) and seed only."""

    arch: str
    d_sae: int
    variant: str = ""
    """The other settings that are not as they are by default, as its name tells them."""
    origin: str = ""
    """Where an autoencoder comes from that was not trained in a run of the report. Empty: it was."""
    told: str | None = field(default=None, compare=False)
    """The part of `variant` that labels tell. None: all of it."""


class SparsityKnob(NamedTuple):
    """What set the number of active latents: `lambda`, `k` or `l0`, and its value. None: not known."""

    name: str
    value: float | None


class MeasuredSAE(BaseModel):
    """One autoencoder as `sagsae eval` measured it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    arch: str
    d_sae: int
    sparsity: float | None
    k: int | None = None
    l0_target: float | None = None
    seed: int | None
    """None: not known, as of an imported autoencoder."""
    r2: float | None
    r2_rest: float | None = None
    r2_all: float | None = None
    l0: float | None
    l0_pos: float | None = None
    l0_neg: float | None = None
    dead_fraction: float | None
    bipolar_fraction: float | None = None
    bipolar_mass: float | None = None
    bipolar_energy: float | None = None
    rescaling: float | None = None
    census: Census | None = None
    directions: Directions | None = None
    ce_spliced: float | None = None
    ce_recovered: float | None = None
    ce_recovered_mean: float | None = None
    tokens: int | None = None
    ce_tokens: int | None = None
    unnamed: str = ""
    """Its settings that its name does not tell (`ReportedRun.unnamed`)."""
    told: str | None = None
    """The part of its variant that labels tell (`naming.labelled`). None: all of it."""
    parameters: int | None = None
    """Number of values in its weights (`ReportedRun.parameters`)."""
    origin: str = ""
    """For an autoencoder that was measured without a run: its run or its folder."""
    imported: ImportSource | None = None
    made_for: Purpose | None = None

    @field_validator("arch")
    @classmethod
    def known(cls, arch: str) -> str:
        if arch not in ARCHITECTURES:
            raise ValueError(f"{arch} is none of {', '.join(ARCHITECTURES)}")
        return arch

    @property
    def key(self) -> FrontierKey:
        special = variant(self.model_dump(include={"name", "seed"}))
        variant_of_all = "-".join(filter(None, (special, self.unnamed)))
        return FrontierKey(self.arch, self.d_sae, variant_of_all, self.origin, self.told)

    @property
    def special(self) -> list[str]:
        """The settings in its variant, one by one: `tie-none-theta0-1.6` -> `tie-none`, `theta0-1.6`."""
        names = [name.replace("_", "-") for name in ARCHITECTURES[self.arch].config.model_fields]
        found = re.split(rf"-(?=(?:{'|'.join(names)}|from-lambda)-)", self.key.variant)
        return [setting for setting in found if setting]

    @property
    def knob(self) -> SparsityKnob:
        if self.k is not None:
            return SparsityKnob("k", self.k)
        if self.l0_target is not None:
            return SparsityKnob("l0", self.l0_target)
        return SparsityKnob("lambda" if self.sparsity is not None else "unknown", self.sparsity)

    @property
    def has_massive(self) -> bool:
        """Whether some of the rows that it was measured on are massive, so that R² on the rest is another."""
        return self.r2_rest is not None and self.r2_rest != self.r2

    @property
    def signed(self) -> bool:
        return ARCHITECTURES[self.arch].signed
