"""Changes activations along one direction, and keeps everything else of them, the autoencoder's error too.

    clamp   x' = x + (v - f_i(x)) d_i          ablate   v = 0          add   x' = x + v d_i

f_i is the value of latent i on x, d_i its row of the decoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from train.autoencoder import Autoencoder
from train.measure.metrics import CODES_AT_A_TIME
from train.sae.families import family


class LatentReader:
    """Encodes some latents of an autoencoder only, where the architecture allows that."""

    def __init__(self, sae: Autoencoder, latents: Sequence[int]) -> None:
        self.sae, self.mathematics = sae, family(sae.config)
        self.which = torch.tensor(list(latents), device=sae.weights.W_dec.device)
        self.weights = self.picked() if self.mathematics.folds else None
        """None: a latent depends on the others, so all of them are encoded."""

    def picked(self) -> Any:
        """The weights of these latents."""
        weights, found = self.sae.weights, {}
        for field in fields(weights):
            axes = field.type.dim_str.split()  # type: ignore[union-attr]
            tensor = getattr(weights, field.name)
            found[field.name] = tensor.index_select(axes.index("d_sae"), self.which) if "d_sae" in axes else tensor
        return replace(weights, **found)

    def __call__(self, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows latents"]:
        """Returns the values of the latents on raw activations."""
        width = len(self.which) if self.weights is not None else self.sae.config.d_sae
        found = [self.encode(part) for part in torch.split(x.float(), max(1, CODES_AT_A_TIME // width))]
        return torch.cat(found)

    def encode(self, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows latents"]:
        if self.weights is None:
            return self.sae.encode(x)[:, self.which]
        found: Tensor = self.mathematics.encode(self.weights, x)
        return found


@dataclass(frozen=True)
class Intervention:
    """A change of activations along one direction."""

    direction: Float[Tensor, " d_in"]
    amount: Float[Tensor, " n"]
    """What each of n contexts (or all of them, n = 1) is moved by, in lengths of `direction`; with `latent`, the value
    that the latent takes."""
    latent: LatentReader | None = None
    """Reads the one latent that is clamped. None: the amount is added."""

    @classmethod
    def on_latent(cls, sae: Autoencoder, latent: int, amount: Tensor, added: bool) -> "Intervention":
        """Returns the intervention that sets a latent to the amount, or adds the amount to it."""
        direction = sae.weights.W_dec[latent].float()
        return cls(direction, amount.to(direction), None if added else LatentReader(sae, [latent]))

    def displacement(self, x: Float[Tensor, "n context d_in"]) -> Float[Tensor, "n context"]:
        """How far each activation moves, in lengths of `direction`."""
        amount = self.amount[:, None].expand(*x.shape[:2])
        return amount if self.latent is None else amount - self.latent(x.flatten(0, 1)).view(*x.shape[:2])

    def __call__(self, x: Float[Tensor, "n context *shape"]) -> Float[Tensor, "n context *shape"]:
        """Returns the changed activations. Computes in float32, and returns the type of `x`."""
        rows = x.flatten(2).float()
        return (rows + self.displacement(rows)[..., None] * self.direction).to(x.dtype).view_as(x)
