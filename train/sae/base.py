"""What every architecture shares: its weights' names, inputs and metrics of a step, the first weights.

All of it is in units in which the activations have unit variance (E|x - mean|² = 1). Axis names: batch, d_in, d_sae,
poles.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Final, Generic, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shared.saes import ARCHITECTURES, SAEConfig
from train.sae.activation import Folded

SMALLEST_NORM: Final = 1e-6
"""A decoder row shorter than this has no direction left and is redrawn."""


@dataclass
class Weights:
    """The parameters, float32."""

    W_enc: Float[Tensor, "d_sae d_in"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]

    LENGTHS: ClassVar[frozenset[str]] = frozenset({"b_dec"})
    """What grows with the activations when these are measured in other units."""
    KEPT: ClassVar[frozenset[str]] = frozenset()
    """What is measured, not trained."""

    def named(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def trained(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.named().items() if name not in self.KEPT}

    def times(self, unit: float) -> "Weights":
        """For activations that are `unit` times as long; the code then is, too. Decoder rows keep their norm."""
        return replace(self, **{name: getattr(self, name) * unit for name in self.LENGTHS})


W = TypeVar("W", bound=Weights)


@dataclass(frozen=True)
class StepInputs:
    """The inputs of a step beside the weights and the batch."""

    sparsity: float | Float[Tensor, ""]
    """λ."""
    matmul: torch.dtype = torch.float32
    """What matrix products take in; all else stays float32."""
    silent: Int[Tensor, " d_sae"] | None = None
    """Training tokens since each latent last fired."""
    parts: int = 1
    """How many equal parts the batch is computed in, of which this is one."""
    threshold: Callable[[Float[Tensor, " n"]], Float[Tensor, ""]] | None = None
    """With several parts, where the batch decides which sizes are active (TopK): from the largest sizes of this part
    to the smallest active one of the whole batch."""


@dataclass(frozen=True)
class StepMetrics:
    """What a step measured, as device tensors (reading one waits for the device)."""

    reconstruction: Float[Tensor, ""]
    """|x - x̂|², mean over the batch: with unit variance, the fraction of variance unexplained."""
    sparsity: Float[Tensor, ""]
    """The penalty, mean over the batch, without λ."""
    auxiliary: Float[Tensor, ""]
    """The rest of the loss."""
    l0: Float[Tensor, ""]
    fired: Bool[Tensor, " d_sae"]
    """Which latents were non-zero somewhere in the batch."""
    threshold: Float[Tensor, ""] | None = None
    """The smallest active size, where a batch decides it (TopK)."""


class Family(ABC, Generic[W]):
    """An architecture: pure functions of weights and activations, for one configuration."""

    signed: bool = False
    """Whether latents carry a sign."""
    unit_decoder: bool = True
    """Whether decoder rows are held at norm one."""
    weights: ClassVar[type[Any]]
    poles: Mapping[str, int] = {}
    """How many rows each of the tensors has whose first axis is the poles."""
    batch_k: int = 0
    """Active latents per token where a batch as a whole chooses them: `largest` and `settle_` are then there. 0: each
    token's own are chosen."""
    resets: ClassVar[tuple[str, ...]] = ()
    """The weights that `reset_` sets; none: it is not there."""
    config: SAEConfig

    @property
    def sparse_step(self) -> bool:
        """Whether its gradients can be computed from open gates alone (train/sae/sparse/)."""
        return ARCHITECTURES[self.config.arch].sparse_step and self.unit_decoder

    @property
    def folds(self) -> bool:
        """Whether one threshold per latent and pole does after training what the activation does: `fold` is there."""
        return type(self).fold is not Family.fold

    @abstractmethod
    def initial(self, d_in: int, mean: Float[Tensor, " d_in"], generator: torch.Generator) -> W:
        """The weights that training begins with."""

    @abstractmethod
    def encode(self, w: W, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """The code f, as it is used after training. A row with a NaN in it gives a row of NaN."""

    @abstractmethod
    def loss(self, w: W, x: Float[Tensor, "batch d_in"], now: StepInputs) -> Float[Tensor, ""]:
        """The training loss, written to be read and differentiated by autograd. `gradients` is what training uses."""

    @abstractmethod
    def gradients(self, w: W, x: Float[Tensor, "batch d_in"], now: StepInputs) -> tuple[W, StepMetrics]:
        """∂loss/∂weights in closed form, and what the step measured."""

    @abstractmethod
    def constrain_(self, w: W) -> None:
        """After the optimiser's step: back to what the weights may be. Decoder rows aside."""

    def fold(self, w: W) -> Folded:
        """The same function as one matrix product, one comparison and one more product."""
        raise NotImplementedError

    def largest(self, w: W, x: Float[Tensor, "batch d_in"], now: StepInputs) -> Float[Tensor, " n"]:
        """The magnitudes in this micro-batch that may be among the active ones of the whole batch."""
        raise NotImplementedError

    def settle_(self, w: W, batches: Iterable[Float[Tensor, "batch d_in"]], rows: int) -> float:
        """Sets, after training, the threshold that makes `batch_k` latents per token active on `rows` rows. Returns
        the L0 that it gives."""
        raise NotImplementedError

    def reset_(self, w: W, x: Float[Tensor, "batch d_in"], which: Bool[Tensor, " d_sae"]) -> None:
        """Resets the weights named by `resets` for the latents in `which`."""
        raise NotImplementedError

    def shapes(self, d_in: int) -> dict[str, tuple[int, ...]]:
        """What shape each tensor of the weights has."""
        sizes = {"d_in": d_in, "d_sae": self.config.d_sae}
        axes = {f.name: str(f.type.dim_str).split() for f in fields(self.weights)}  # type: ignore[union-attr]
        return {name: tuple(sizes.get(axis) or self.poles[name] for axis in names) for name, names in axes.items()}

    def absorb_(self, w: W, step: StepMetrics) -> None:
        """Takes what the step measured into the weights that are not trained."""


def decode(w: Weights, f: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_in"]:
    return f @ w.W_dec + w.b_dec


def first_weights(d_in: int, d_sae: int, mean: Float[Tensor, " d_in"], generator: torch.Generator) -> dict[str, Tensor]:
    """Random unit decoder rows, the encoder a copy of them, b_dec the data's mean."""
    W_dec = torch.randn(d_sae, d_in, generator=generator)
    W_dec /= W_dec.norm(dim=1, keepdim=True).clamp_min(1e-8)
    return {"W_enc": W_dec.clone(), "W_dec": W_dec, "b_dec": mean.float().clone()}
