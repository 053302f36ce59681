"""Every architecture of autoencoder: its settings, and what the program knows of it beside its mathematics.

`arch` decides which settings there are; a setting that an architecture does not have is refused. `ARCHITECTURES` holds
one entry for each. Training, `memory`, `report` and `--help` read it; nothing here needs torch. To add an architecture,
write a configuration and an entry here, and its mathematics in one file in train/sae/.
docs/how-to/add-an-architecture.md explains every line of it; docs/explanation/method.md explains the mathematics.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, get_args

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    model_serializer,
    model_validator,
)

from shared.errors import UserError
from shared.gate import quoted
from shared.schema import Frozen, build

DEFAULT_SPARSITIES = (0.1, 0.15, 0.22, 0.33, 0.5)
JUMPRELU_SPARSITIES = (0.001, 0.002, 0.005, 0.01, 0.02)
"""λ of JumpReLU is the price of an active latent, not of its magnitude: with the others' grid every L0 ends at 3."""
DIGEST: Final = 12
"""Digits of a digest that the name of an autoencoder has. Other values are shorter."""
DEFAULT_KS = (8, 16, 32, 64, 128)
"""The default grid of k. A grid only takes those that are at most a quarter of the latents."""
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class StepMemory(NamedTuple):
    """How many tensors a dense training step holds at its peak, counted in float32."""

    codes: float
    """Tensors [batch, d_sae]."""
    matrices: float
    """Tensors [d_sae, d_in], beside the weights and their gradients."""


UNMEASURED: Final = StepMemory(16.0, 2.0)
"""For an architecture whose step was not measured: more than any that was."""


class SAEConfig(Frozen):
    """The settings that every autoencoder has."""

    arch: str
    """The architecture."""
    d_sae: Annotated[int, Field(ge=1, le=1 << 24)]
    """Number of latents."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seeds the initial weights. --data-seed is that of the order of the activations."""
    lr: Positive | None = None
    """Peak learning rate of this one. Default: the run's."""
    start: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """SHA-256 of the weights that it starts from, which `warm_start` of the run names. Default: none, random weights.

    Training sets it. It is part of the autoencoder's name."""

    LATER: ClassVar[frozenset[str]] = frozenset({"start"})
    """Settings that records of earlier versions lack. They are recorded only where they are not as by default."""

    @model_serializer(mode="wrap")
    def recorded(self, write: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        """The settings as records have them."""
        usual = {key: type(self).model_fields[key].default for key in self.LATER}
        return {key: value for key, value in write(self).items() if key not in usual or value != usual[key]}

    @property
    def knob(self) -> str:
        """The setting that decides the number of active latents, as part of a name."""
        raise NotImplementedError

    def step_memory(self, rounded: bool) -> StepMemory:  # noqa: ARG002
        """What a dense step holds. `rounded`: its matrix products take in a type of two bytes."""
        return UNMEASURED

    @property
    def name(self) -> str:
        """The autoencoder's unique name in a run. It lists every setting that differs from its default."""
        usual = {"arch", "d_sae", "seed", "sparsity", "l0_target", "k"}
        special = [
            f"-{key.replace('_', '-')}-{in_name(value)}"
            for key, value in self
            if key not in usual and value != type(self).model_fields[key].default
        ]
        return f"{self.arch}-{self.d_sae}-{self.knob}-seed{self.seed}{''.join(special)}"


def in_name(value: Any) -> str:
    """A setting's value as names of autoencoders tell it: six digits of a number, the beginning of a digest."""
    return f"{value:g}" if isinstance(value, float) else str(value).lower()[:DIGEST]


class Penalised(SAEConfig):
    """Settings where λ times a penalty decides how many latents are active."""

    sparsity: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = 0.2
    """λ, the weight of the penalty, for activations of unit variance. With an `l0_target`, where λ begins.

    The command line trains a list of several λ where you give none. An imported autoencoder has null: its λ is not
    known."""
    l0_target: Positive | None = None
    """Active latents a token that λ is steered to, over the first 70 % of the run."""
    sparsity_warmup: Share = 0.0
    """The first part of the run, over which λ rises linearly from zero."""

    @model_validator(mode="after")
    def check(self) -> "Penalised":
        if self.l0_target and self.l0_target >= self.d_sae:
            raise ValueError(f"l0_target: {self.l0_target:g} of {self.d_sae} latents cannot be active")
        if self.l0_target and not self.sparsity:
            raise ValueError("sparsity: must be above 0 for an l0_target to begin with")
        return self

    @property
    def knob(self) -> str:
        if self.sparsity is None:
            return "imported"
        return f"l0-{self.l0_target:g}" if self.l0_target else f"lambda{self.sparsity:g}"

    @property
    def known_sparsity(self) -> float:
        """λ as a number. Raises ValueError where it is not known."""
        if self.sparsity is None:
            raise ValueError(f"sparsity: {self.name} was imported, and its λ is not known. Training needs a number")
        return self.sparsity


class Thresholded(Penalised):
    """Settings of latents that each have a gate with a threshold of its own."""

    aux: bool = True
    """The auxiliary reconstruction, which is what trains the thresholds. Without it everything dies (an ablation)."""
    theta0: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.4
    """Initial threshold, in units of 1/sqrt(d_in)."""
    reset_every: Annotated[int, Field(ge=0)] = 0
    """Steps between resets: latents that did not fire since the last one get a new threshold. 0: never."""
    reset_share: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of a batch on which a latent fires after its reset."""

    def step_memory(self, rounded: bool) -> StepMemory:
        return StepMemory(10.1, 1.5) if rounded else StepMemory(9.1, 0.0)


class SaGsae(Thresholded):
    """Sign-Aware Gated SAE (arXiv 2605.28149)."""

    LATER: ClassVar = frozenset({"start", "theta0_negative", "negative_rate", "majority_sign"})

    arch: Literal["sa-gsae"]
    tie: Literal["symmetric", "magnitude", "none"] = "symmetric"
    """What both poles of a latent share: all three scalars, the rescaling r alone, or none."""
    one_sided: bool = False
    """Close every negative pole (an ablation): a Gated SAE of the same width."""
    theta0_negative: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Initial threshold of the negative poles, as a multiple of the positive poles'. The paper's is 1. With more, a
    latent begins almost one-sided, and its second pole opens where the data pay for it. Not with `tie` symmetric."""
    negative_rate: Share | None = None
    """Replaces `theta0_negative`: the negative poles begin at the threshold at which all of them together fire this
    share of `l0_target`, or of what the positive poles fire where there is no target. 0 keeps them closed."""
    majority_sign: bool = True
    """After training, flip the latents whose negative pole carries more energy. It changes no reconstruction. An
    autoencoder that starts from another one (--from) keeps that one's signs."""

    @model_validator(mode="after")
    def check_poles(self) -> "SaGsae":
        name = "negative_rate" if self.negative_rate is not None else "theta0_negative"
        if not self.uneven:
            return self
        if self.tie == "symmetric":
            raise ValueError(f"{name}: the poles share one threshold with tie = symmetric. Use magnitude or none")
        if self.one_sided:
            raise ValueError(f"{name}: has no effect with one_sided, which closes the negative poles")
        if self.negative_rate is not None and self.theta0_negative != 1.0:
            raise ValueError("theta0_negative: has no effect with negative_rate. Give one of the two")
        return self

    @property
    def uneven(self) -> bool:
        """Whether the two poles of a latent begin with different thresholds."""
        return self.negative_rate is not None or self.theta0_negative != 1.0

    def step_memory(self, rounded: bool) -> StepMemory:
        if self.one_sided:
            return super().step_memory(rounded)
        by_tie = {"symmetric": 0.0, "magnitude": 0.5, "none": 2.5}
        return StepMemory((12.1 if rounded else 13.1) + by_tie[self.tie], 1.5 if rounded else 0.0)


class Gated(Thresholded):
    """Gated SAE (arXiv 2404.16014)."""

    arch: Literal["gated"]
    decoder: Literal["unit", "free"] = "unit"
    """unit: decoder rows have norm one, and the auxiliary term does not train them. free: their norms are free, the
    auxiliary term trains them too, and each latent's penalty is weighted by its row's norm. A mixture trains worse."""


class Relu(Penalised):
    """ReLU with an L1 penalty."""

    arch: Literal["relu"]

    def step_memory(self, rounded: bool) -> StepMemory:
        return StepMemory(4.1, 0.5) if rounded else StepMemory(3.1, 0.0)


class JumpRelu(Penalised):
    """JumpReLU with an L0 penalty and straight-through gradients (arXiv 2407.14435)."""

    arch: Literal["jumprelu"]
    sparsity: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = 0.005
    """λ, the price of an active latent, for activations of unit variance. With an `l0_target`, where λ begins."""
    theta0: Positive = 0.4
    """Initial threshold, in units of 1/sqrt(d_in)."""
    bandwidth: Positive = 0.5
    """Width of the kernel that stands for the step's derivative, in units of 1/sqrt(d_in)."""

    def step_memory(self, rounded: bool) -> StepMemory:
        return StepMemory(6.1, 0.5 if rounded else 0.0)


class FixedL0(SAEConfig):
    """Settings where k latents per token are active, and inactive ones learn from what these leave."""

    k: Annotated[int, Field(ge=1)] = 32
    """Active latents per token."""
    aux_k: Annotated[int, Field(ge=0)] | None = None
    """How many latents that were inactive for `aux_after` tokens reconstruct what the active ones leave. Default:
    d_in / 8, at least 16; for topk and signed-topk d_in / 2."""
    aux_after: Annotated[int, Field(ge=1)] = 200_000
    """Training tokens."""

    @model_validator(mode="after")
    def check(self) -> "FixedL0":
        if self.k > self.d_sae:
            raise ValueError(f"k: {self.k} of {self.d_sae} latents cannot be active")
        return self

    @property
    def knob(self) -> str:
        return f"k{self.k}"


class TopK(FixedL0):
    """TopK: the k largest latents of each token (arXiv 2406.04093)."""

    arch: Literal["topk"]

    def step_memory(self, rounded: bool) -> StepMemory:
        return StepMemory(7.1, 1.5 if rounded else 1.0)


class SignedTopK(FixedL0):
    """TopK by absolute value, with signed latents: the k largest |u| of each token (arXiv 2510.00404)."""

    arch: Literal["signed-topk"]

    def step_memory(self, rounded: bool) -> StepMemory:
        return StepMemory(8.1, 1.5 if rounded else 1.0)


class BatchTopK(FixedL0):
    """BatchTopK: the k largest latents per token, on average over the batch (arXiv 2412.06410)."""

    arch: Literal["batch-topk"]

    def step_memory(self, rounded: bool) -> StepMemory:
        return StepMemory(9.1, 1.5 if rounded else 1.0)


class AbsTopK(FixedL0):
    """BatchTopK by absolute value, with signed latents (arXiv 2510.00404)."""

    arch: Literal["abs-topk"]

    def step_memory(self, rounded: bool) -> StepMemory:
        return StepMemory(11.6, 1.5) if rounded else StepMemory(11.1, 1.0)


@dataclass(frozen=True)
class Architecture:
    """What the program knows of an architecture."""

    config: type[SAEConfig]
    """Its settings. The first line of the docstring is its help text, and `arch` is its name."""
    family: str
    """Its mathematics, as `module:class`; train/sae/families.py imports it when it is needed."""
    label: str
    """Its name in a report."""
    colours: tuple[str, str]
    """In a report: on a light and on a dark ground."""
    signed: bool = False
    """Whether latents carry a sign."""
    sparse_step: bool = False
    """Whether a step can be computed from open gates alone, as long as decoder rows have norm one."""
    sparsities: tuple[float, ...] = DEFAULT_SPARSITIES
    """The grid of λ where none is asked for."""

    @property
    def name(self) -> str:
        (name,) = get_args(self.config.model_fields["arch"].annotation)
        return str(name)

    @property
    def summary(self) -> str:
        """One line for `--help`."""
        return (self.config.__doc__ or "").partition("\n")[0].removesuffix(".")

    def has(self, setting: str) -> bool:
        return setting in self.config.model_fields


ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    entry.name: entry
    for entry in (
        Architecture(
            SaGsae,
            family="train.sae.gated:GatedFamily",
            label="SA-GSAE",
            colours=("#0072b2", "#56b4e9"),
            signed=True,
            sparse_step=True,
        ),
        Architecture(
            Gated,
            family="train.sae.gated:GatedFamily",
            label="Gated",
            colours=("#d55e00", "#f0914a"),
            sparse_step=True,
        ),
        Architecture(
            Relu,
            family="train.sae.relu:ReluFamily",
            label="ReLU",
            colours=("#7a6a00", "#d6c54c"),
        ),
        Architecture(
            JumpRelu,
            family="train.sae.relu:JumpReluFamily",
            label="JumpReLU",
            colours=("#00805c", "#3fc79a"),
            sparsities=JUMPRELU_SPARSITIES,
        ),
        Architecture(
            BatchTopK,
            family="train.sae.batch_topk:BatchTopKFamily",
            label="BatchTopK",
            colours=("#c2528b", "#ea9cc6"),
        ),
        Architecture(
            AbsTopK,
            family="train.sae.batch_topk:BatchTopKFamily",
            label="AbsTopK",
            colours=("#6a3fb5", "#ab93f0"),
            signed=True,
        ),
        Architecture(
            TopK,
            family="train.sae.topk:TopKFamily",
            label="TopK",
            colours=("#6b4226", "#c8a27c"),
        ),
        Architecture(
            SignedTopK,
            family="train.sae.topk:TopKFamily",
            label="SignedTopK",
            colours=("#a3333d", "#e08a92"),
            signed=True,
        ),
    )
}
"""By name, in the order in which they are listed. Hues after Okabe and Ito."""


def architectures_with(setting: str) -> list[str]:
    """The names of those that have a setting."""
    return [name for name, architecture in ARCHITECTURES.items() if architecture.has(setting)]


def check_architecture(arch: object, place: str) -> None:
    """Raises UserError, with the nearest name, for what is no architecture."""
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        near = difflib.get_close_matches(str(arch)[:60], ARCHITECTURES, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"{place}: {quoted(arch)} is none of {', '.join(ARCHITECTURES)}.{hint}")


def sae_config(**values: Any) -> Any:
    """The configuration of the architecture that `arch` names. Raises UserError naming the first wrong setting."""
    check_architecture(arch := values.get("arch"), "arch")
    return build(ARCHITECTURES[str(arch)].config, values)


def known(value: Any) -> Any:
    return sae_config(**value) if isinstance(value, dict) else value


AnySAE = SerializeAsAny[Annotated[SAEConfig, BeforeValidator(known)]]
"""As a field of another configuration."""


def usual_ks(d_sae: int) -> list[int]:
    return [k for k in DEFAULT_KS if 4 * k <= d_sae] or [max(1, d_sae // 8)]


def shared_sparsity(archs: Sequence[str], sparsity: Sequence[float]) -> str | None:
    """A warning where one list of λ goes to architectures whose λ means different things."""
    asked = {named.partition(":")[0] for named in archs}
    grids = {arch: ARCHITECTURES[arch].sparsities for arch in sorted(asked) if ARCHITECTURES[arch].has("sparsity")}
    if not sparsity or len(set(grids.values())) < 2:
        return None
    own = "; ".join(f"{arch} {grid[0]:g} to {grid[-1]:g}" for arch, grid in grids.items())
    return (
        f"--sparsity goes to {', '.join(grids)} alike, but λ is not the same price of a latent in all of them (their "
        f"own grids: {own}). Train them in runs of their own, or give --l0-target"
    )


def sae_grid(
    archs: Sequence[str], axes: Mapping[str, Sequence[Any]], options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Every combination of the axes (`d_sae`, `sparsity`, `l0_target`, `k`, `seed`, `lr`) that an architecture has.

    `gated:8192` gives an architecture a width of its own. `options` go to every architecture that has them. Raises
    UserError when an architecture has no width, or when none has one of the options.
    """
    grid: list[dict[str, Any]] = []
    used: set[str] = set()
    for named in archs or ["sa-gsae"]:
        arch, colon, own = named.partition(":")
        check_architecture(arch, f"--arch {named}")
        if colon and not re.fullmatch("[0-9]+", own):
            raise UserError(f"--arch {named}: expected ARCH or ARCH:WIDTH, such as gated:8192")
        fields = ARCHITECTURES[arch].config.model_fields
        mine = {key: list(values) for key, values in axes.items() if key in fields and values}
        if colon:
            if not int(own):
                raise UserError(f"--arch {named}: the width must be 1 or more (got {own})")
            mine["d_sae"] = [int(own)]
        if colon and axes.get("d_sae") and all(":" in each for each in archs):
            raise UserError(f"--d-sae: every --arch has a width of its own ({named}). Leave one of the two out")
        if "d_sae" not in mine:
            raise UserError(f"--arch {named}: how wide? Give --d-sae, or {arch}:WIDTH")
        if "sparsity" in fields and not {"sparsity", "l0_target"} & set(mine):
            mine["sparsity"] = list(ARCHITECTURES[arch].sparsities)
        points = [dict(zip(mine, point, strict=True)) for point in product(*mine.values())]
        if "k" in fields and "k" not in mine:
            points = [{**point, "k": k} for point in points for k in usual_ks(point["d_sae"])]
        here = {key: value for key, value in options.items() if key in fields}
        used |= here.keys() | mine.keys()
        grid += [{"arch": arch, **point, **here} for point in points]
    idle = [key for key in [*(key for key, values in axes.items() if values), *options] if key not in used]
    if idle:
        owners = ", ".join(architectures_with(idle[0])) or "no architecture"
        raise UserError(f"--{idle[0].replace('_', '-')}: is for {owners}, and --arch names none of them")
    return grid
