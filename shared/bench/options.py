"""What the benchmarks can be asked, as schemas: their fields are the options of `sagsae bench …`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from shared.config import Folder, HarvestConfig, Location, TrainConfig
from shared.saes import sae_config
from shared.schema import Frozen

Rounds = Annotated[int, Field(ge=1)]


class StoreBenchOptions(Frozen):
    """Reading and writing a store against the codec alone, and against other Zarr readers."""

    groups: ClassVar[Mapping[str, str]] = {"Benchmark": "model tokens width rounds keep"}

    model: str = "tiny"
    """Model whose activations are harvested first."""
    tokens: Annotated[int, Field(ge=32_768)] = 65_536
    """Rows to harvest."""
    width: Annotated[int, Field(ge=1)] = 2048
    """Width of the rows that are read: hookpoints of a small model side by side."""
    rounds: Rounds = 15
    """Rounds that medians are taken over."""
    keep: Folder | None = None
    """Folder to keep the stores in; those that are there are used again. Default: a temporary folder."""


class RemoteBenchOptions(StoreBenchOptions):
    """Reading a store through its activation cache against reading its folder."""

    rounds: Rounds = 5
    """Rounds that medians are taken over."""


class TrainBenchOptions(Frozen):
    """A training step in three forms and by other tools, one pass against separate runs, waiting for data."""

    groups: ClassVar[Mapping[str, str]] = {
        "Benchmark": "store hook widths batch l0 precision rounds runs device compiled peer_python"
    }

    store: Location | None = None
    """A store with rows to train on. Default: one of the shipped model's mlp_out."""
    hook: str = "mlp_out"
    """The store's hookpoint to train on."""
    widths: tuple[Annotated[int, Field(ge=1)], ...] = (4096, 16384)
    """Number of latents, d_sae."""
    batch: Annotated[int, Field(ge=8)] = 2048
    """Tokens per step."""
    l0: Annotated[int, Field(ge=1)] = 32
    """Active latents per token."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Inputs of matrix products."""
    rounds: Rounds = 5
    """Steps that medians are taken over."""
    runs: Annotated[int, Field(ge=0)] | None = None
    """Rounds of whole runs, together and apart; 0 for none. Default: half as many as of steps."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …"""
    compiled: bool | None = None
    """Measure the compiled dense step, too. Default: on a GPU."""
    peer_python: tuple[str, ...] = ()
    """Python of an environment with sae-lens, dictionary-learning or both."""


class FeaturesBenchOptions(Frozen):
    """The pass that finds what latents fire on, against encoding the same rows alone."""

    groups: ClassVar[Mapping[str, str]] = {"Benchmark": "run sae rounds"}

    run: Folder | None = None
    """A finished training run; its features/ are made again. Default: a new one of the shipped model's mlp_out."""
    sae: str | None = None
    """The autoencoder's name in the run. Default: the only one in the run."""
    rounds: Rounds = 5
    """Rounds that medians are taken over."""


def features_harvest(folder: Path) -> HarvestConfig:
    """The store that is read by default."""
    return HarvestConfig(model="tiny", hooks=("mlp_out",), tokens=524_288, device="cpu", out=folder / "store")


def features_train(folder: Path, store: Path | str) -> TrainConfig:
    """The autoencoder that is looked at by default: about 15 of its 1,024 latents are active."""
    sae = sae_config(arch="sa-gsae", d_sae=1024, sparsity=0.37)
    return TrainConfig(store=str(store), hook="mlp_out", saes=(sae,), batch=512, tokens=1_000_000, out=folder / "run")


class ScaleBenchOptions(Frozen):
    """Seconds and memory to open, describe, check, train on and harvest into stores of growing size."""

    groups: ClassVar[Mapping[str, str]] = {"Benchmark": "quick folder"}

    quick: bool = False
    """Use small stores, to see that it works."""
    folder: Folder | None = None
    """Where the stores are made: about 3 GB and 2 million files. Default: a temporary folder."""


class ServeBenchOptions(Frozen):
    """What the activation cache's server takes: for a request that is answered at once, for a GB of a store, and as the
    catalog grows."""

    groups: ClassVar[Mapping[str, str]] = {"Benchmark": "requests gigabytes sizes folder"}

    requests: Annotated[int, Field(ge=10, le=100_000)] = 500
    """Repeated requests."""
    gigabytes: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 1.0
    """GB to read by ranges."""
    sizes: tuple[Annotated[int, Field(ge=1, le=100_000)], ...] = (10, 1000, 10_000)
    """Stores, and jobs, in the catalogs whose start and lists are measured."""
    folder: Folder | None = None
    """Where the stores are made. Default: a temporary folder."""
