"""What an autoencoder can be asked to be: a small frozen configuration per architecture (mathematics: docs/method.md).

`arch` decides which; a setting that an architecture does not have is refused. Adding an architecture is one class here,
one line in `ARCHITECTURES`, one file in train/sae/ and one line in its `family`.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from shared.errors import UserError
from shared.schema import Frozen, build

DEFAULT_SPARSITIES = (0.1, 0.15, 0.22, 0.33, 0.5)
JUMPRELU_SPARSITIES = (0.001, 0.002, 0.005, 0.01, 0.02)
"""λ of JumpReLU is the price of a latent, not of its size: with the others' grid all of them end at an L0 of 3."""
DEFAULT_KS = (8, 16, 32, 64, 128)
"""Those that are at most a quarter of the latents."""
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SAEConfig(Frozen):
    """What every autoencoder has."""

    arch: str
    d_sae: Annotated[int, Field(ge=1, le=1 << 24)]
    """Number of latents."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seeds the initial weights."""
    lr: Positive | None = None
    """Peak learning rate of this one. Default: the run's."""

    @property
    def knob(self) -> str:
        """What sets the number of active latents, as part of a name."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """Says all that is not as it would be by default."""
        usual = {"arch", "d_sae", "seed", "sparsity", "l0_target", "k"}
        special = [
            f"-{key.replace('_', '-')}-{format(value, 'g') if isinstance(value, float) else str(value).lower()}"
            for key, value in self
            if key not in usual and value != type(self).model_fields[key].default
        ]
        return f"{self.arch}-{self.d_sae}-{self.knob}-seed{self.seed}{''.join(special)}"


class Penalised(SAEConfig):
    """λ times a penalty decides how many latents are active."""

    sparsity: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.2
    """λ, the weight of the penalty, for activations of unit variance. With an `l0_target`, where λ begins."""
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
        return f"l0-{self.l0_target:g}" if self.l0_target else f"lambda{self.sparsity:g}"


class Thresholded(Penalised):
    """Latents with a gate of their own."""

    aux: bool = True
    """The auxiliary reconstruction, which is what trains the thresholds. Without it everything dies (an ablation)."""
    theta0: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.4
    """Initial threshold, in units of 1/sqrt(d_in)."""
    reset_every: Annotated[int, Field(ge=0)] = 0
    """Steps after which latents that did not fire since get a new threshold. 0: never."""
    reset_share: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of a batch on which a latent fires after its reset."""


class SaGsae(Thresholded):
    """Sign-Aware Gated SAE (arXiv 2605.28149)."""

    arch: Literal["sa-gsae"]
    tie: Literal["symmetric", "magnitude", "none"] = "symmetric"
    """What both poles of a latent share: all three scalars, the rescaling r alone, or none."""
    one_sided: bool = False
    """Close every negative pole (an ablation): a Gated SAE of the same width."""


class Gated(Thresholded):
    """Gated SAE (arXiv 2404.16014)."""

    arch: Literal["gated"]
    decoder: Literal["unit", "free"] = "unit"
    """unit: rows of norm one, not trained by the auxiliary term. free: neither is so, and the penalty is weighted by
    the rows' norms. Half of the one and half of the other does not exist: it trains worse than both."""


class Relu(Penalised):
    """ReLU with an L1 penalty."""

    arch: Literal["relu"]


class JumpRelu(Penalised):
    """JumpReLU with an L0 penalty and straight-through gradients (arXiv 2407.14435)."""

    arch: Literal["jumprelu"]
    sparsity: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.005
    """λ, the price of an active latent, for activations of unit variance. With an `l0_target`, where λ begins."""
    theta0: Positive = 0.4
    """Initial threshold, in units of 1/sqrt(d_in)."""
    bandwidth: Positive = 0.5
    """Width of the kernel that stands for the step's derivative, in units of 1/sqrt(d_in)."""


class TopK(SAEConfig):
    """The k largest latents a token, on average over the batch, are active."""

    k: Annotated[int, Field(ge=1)] = 32
    aux_k: Annotated[int, Field(ge=0)] | None = None
    """Latents silent for `aux_after` tokens that reconstruct what the others leave. Default: d_in / 8, at least 16."""
    aux_after: Annotated[int, Field(ge=1)] = 200_000
    """Training tokens."""

    @model_validator(mode="after")
    def check(self) -> "TopK":
        if self.k > self.d_sae:
            raise ValueError(f"k: {self.k} of {self.d_sae} latents cannot be active")
        return self

    @property
    def knob(self) -> str:
        return f"k{self.k}"


class BatchTopK(TopK):
    """BatchTopK (arXiv 2412.06410)."""

    arch: Literal["batch-topk"]


class AbsTopK(TopK):
    """BatchTopK by absolute value, with signed latents (arXiv 2510.00404)."""

    arch: Literal["abs-topk"]


ARCHITECTURES: dict[str, type[SAEConfig]] = {
    "sa-gsae": SaGsae, "gated": Gated, "relu": Relu, "jumprelu": JumpRelu, "batch-topk": BatchTopK, "abs-topk": AbsTopK,
}  # fmt: skip
SIGNED = ("sa-gsae", "abs-topk")
"""Whose latents carry a sign."""


def sae_config(**values: Any) -> Any:
    """The configuration of the architecture that `arch` names. Raises UserError naming the first wrong setting."""
    arch = values.get("arch")
    if arch not in ARCHITECTURES:
        raise UserError(f"arch: {arch!r} is none of {', '.join(ARCHITECTURES)}")
    return build(ARCHITECTURES[arch], values)


def known(value: Any) -> Any:
    return sae_config(**value) if isinstance(value, dict) else value


AnySAE = SerializeAsAny[Annotated[SAEConfig, BeforeValidator(known)]]
"""As a field of another configuration."""


def usual_ks(d_sae: int) -> list[int]:
    return [k for k in DEFAULT_KS if 4 * k <= d_sae] or [max(1, d_sae // 8)]


def shared_sparsity(archs: Sequence[str], sparsity: Sequence[float]) -> str | None:
    """What to say where one list of λ is asked for of architectures for which λ means different things."""
    asked = {named.partition(":")[0] for named in archs}
    penalised = {arch for arch in asked if "sparsity" in ARCHITECTURES[arch].model_fields}
    if not sparsity or "jumprelu" not in penalised or len(penalised) < 2:
        return None
    return (
        f"--sparsity goes to {', '.join(sorted(penalised))} alike, but λ of jumprelu is the price of a latent, about a "
        f"hundredth of the others' for the same L0 (its own grid: {JUMPRELU_SPARSITIES[0]:g} to "
        f"{JUMPRELU_SPARSITIES[-1]:g}). Give it a run of its own, or --l0-target"
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
        if arch not in ARCHITECTURES:
            raise UserError(f"--arch {named}: is none of {', '.join(ARCHITECTURES)}")
        if colon and not re.fullmatch("[0-9]+", own):
            raise UserError(f"--arch {named}: expected ARCH or ARCH:WIDTH, such as gated:8192")
        fields = ARCHITECTURES[arch].model_fields
        mine = {key: list(values) for key, values in axes.items() if key in fields and values}
        if colon:
            mine["d_sae"] = [int(own)]
        if colon and axes.get("d_sae") and all(":" in each for each in archs):
            raise UserError(f"--d-sae: every --arch has a width of its own ({named}). Leave one of the two out")
        if "d_sae" not in mine:
            raise UserError(f"--arch {named}: how wide? Give --d-sae, or {arch}:WIDTH")
        if "sparsity" in fields and not {"sparsity", "l0_target"} & set(mine):
            mine["sparsity"] = list(JUMPRELU_SPARSITIES if arch == "jumprelu" else DEFAULT_SPARSITIES)
        points = [dict(zip(mine, point, strict=True)) for point in product(*mine.values())]
        if "k" in fields and "k" not in mine:
            points = [{**point, "k": k} for point in points for k in usual_ks(point["d_sae"])]
        here = {key: value for key, value in options.items() if key in fields}
        used |= here.keys() | mine.keys()
        grid += [{"arch": arch, **point, **here} for point in points]
    idle = [key for key in [*(key for key, values in axes.items() if values), *options] if key not in used]
    if idle:
        raise UserError(f"--{idle[0].replace('_', '-')}: none of the architectures asked for has it")
    return grid
