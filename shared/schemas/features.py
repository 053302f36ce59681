"""The configurations of `sagsae features` and `sagsae explain` (shared/config.py says how a schema works)."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from shared.config import Folder, Location
from shared.schema import Frozen, Shown

NEURONPEDIA_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$"
NeuronpediaName = Annotated[str, Field(pattern=NEURONPEDIA_NAME)]


class FeaturesConfig(Frozen):
    """One pass over a store that finds what every latent of an autoencoder fires on: one of a run, or one that stands
    alone."""

    groups: ClassVar[Mapping[str, str]] = {
        "Run": "run sae store model overwrite",
        "Autoencoder without a run": "hook transfer out",
        "Rows": "tokens cofire_every",
        "Examples": "top drawn",
        "Computation": "device",
        "Export": "export creator creator_id model_id set_name split",
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
    drawn: Annotated[int, Field(ge=0, le=1024)] = 12
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
    export: Literal["neuronpedia"] | None = None
    """Write what an earlier call found for another tool, instead of reading the store. Default: no export.

    neuronpedia: the files of its bulk import, OUT/MODEL/LAYER-SET/."""
    out: Folder | None = None
    """The folder to write: that of an export, or of an autoencoder without a run. Default: RUN/features/NAME."""
    creator: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """The name that Neuronpedia shows as the maker. Default: none; an export needs one."""
    creator_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] = "clkht01d40000jv08hvalcvly"
    """The id of the Neuronpedia user who owns what is imported: an import fails without that user.

    The default is the user that every new Neuronpedia database has."""
    model_id: NeuronpediaName | None = None
    """The language model's id in Neuronpedia. Default: the model's name in small letters, without its owner."""
    set_name: NeuronpediaName | None = None
    """The name of the source set. Default: made from the hookpoint, the architecture and the width."""
    split: bool = False
    """Export each latent as two non-negative features, i and i + d_sae, which every tool understands."""

    @model_validator(mode="after")
    def check_what(self) -> "FeaturesConfig":
        if self.export is not None:
            return self
        for key in EXPORT_ONLY:
            if key in self.model_fields_set:
                raise ValueError(f"{key}: is for an export. Add --export neuronpedia")
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

    @model_validator(mode="after")
    def check_export(self) -> "FeaturesConfig":
        if self.export is None:
            return self
        if self.run is None:
            raise ValueError("RUN: an export needs the run whose features were found")
        if self.out is None:
            raise ValueError("out: an export needs a folder to write. Add --out FOLDER")
        if self.creator is None:
            raise ValueError("creator: Neuronpedia shows who made it. Add --creator NAME")
        return self


EXPORT_ONLY = ("creator", "creator_id", "model_id", "set_name", "split")


class ExplainConfig(Frozen):
    """Names for the poles of an autoencoder's latents, written and tested by a language model behind an endpoint."""

    groups: ClassVar[Mapping[str, str]] = {
        "Run": "run sae",
        "Endpoint": "endpoint model key_variable timeout at_once temperature answer_tokens",
        "Latents": "only latents seed",
        "Tests": "windows",
        "Consent": "yes",
    }

    run: Annotated[Folder, Shown(option="RUN")]
    """The training run's folder, with what `sagsae features` wrote."""
    sae: str | None = None
    """The autoencoder's name in the run. Default: the only one that `sagsae features` was called for."""
    endpoint: Annotated[str, Shown("URL")] | None = None
    """An OpenAI-compatible server, such as https://HOST/v1. Default: none, and nothing is sent.

    Calls go to /v1/chat/completions below it."""
    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """The name of the language model at the endpoint. Default: none; an endpoint needs one."""
    key_variable: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")] = "SAGSAE_EXPLAIN_KEY"
    """The environment variable that holds the endpoint's key. Without it no key is sent.

    The key is in no file and no message. It goes to the endpoint alone, and only over https or to this machine."""
    timeout: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """Seconds that one answer may take."""
    at_once: Annotated[int, Field(ge=1, le=64)] = 4
    """Calls at the same time."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """The temperature of each call."""
    answer_tokens: Annotated[int, Field(ge=16, le=100_000)] = 400
    """Maximum number of tokens of an answer. A model that reasons before it answers needs more."""
    only: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Shown("LATENT")] = ()
    """The latents to explain. Default: --latents of them."""
    latents: Annotated[int, Field(ge=1)] = 20
    """Number of latents to explain, drawn at random among those with enough examples.

    A random draw makes the mean scores speak for the whole dictionary."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the draw."""
    windows: Annotated[int, Field(ge=10, le=400)] = 20
    """Windows of text per test and pole: half that fire, half that do not."""
    yes: bool = False
    """Do not ask before the calls are made."""

    @model_validator(mode="after")
    def check(self) -> "ExplainConfig":
        if self.endpoint is not None and self.model is None:
            raise ValueError("model: which model of the endpoint? Add --model NAME")
        if self.only and "latents" in self.model_fields_set:
            raise ValueError("latents: --only names the latents already. Give one of the two")
        return self
