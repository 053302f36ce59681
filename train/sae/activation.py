"""Bi-JumpReLU, the activation that every architecture here comes down to once it is trained.

    f = z + b⁺          where z > T⁺
        ρz - b⁻         where -ρz > T⁻
        0               elsewhere

T, b of each pole are per latent; ρ > 0 is the slope of the negative pole. With equal poles:
f = sgn(z)(|z| + b)·1[|z| > T].
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


def bi_jump_relu(
    z: Float[Tensor, "*batch d_sae"],
    threshold: Float[Tensor, "#poles d_sae"],
    offset: Float[Tensor, "#poles d_sae"] | None = None,
    slope: Float[Tensor, " d_sae"] | None = None,
) -> Float[Tensor, "*batch d_sae"]:
    """`threshold` and `offset` have a row for the positive and one for the negative pole, or one for both. A threshold
    of infinity closes a pole; thresholds of a latent must not sum to less than zero, or both poles would be open at
    once. Without an offset: 0. Without a slope: 1. NaN gives NaN."""
    above, below = threshold[0], threshold[-1]
    plus, minus = (offset[0], offset[-1]) if offset is not None else (0.0, 0.0)
    down = -z if slope is None else -z * slope
    return torch.where(z <= above, 0.0, z + plus) - torch.where(down <= below, 0.0, down + minus)


@dataclass(frozen=True)
class Folded:
    """A trained autoencoder for inference: f = bi_jump_relu(x W_encᵀ + b_enc), x̂ = f W_dec + b_dec."""

    W_enc: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]
    threshold: Float[Tensor, "2 d_sae"]
    offset: Float[Tensor, "2 d_sae"]
    slope: Float[Tensor, " d_sae"]

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        return bi_jump_relu(x @ self.W_enc.T + self.b_enc, self.threshold, self.offset, self.slope)

    def decode(self, f: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_in"]:
        return f @ self.W_dec + self.b_dec


def one_sided(
    W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, threshold: Tensor, offset: Tensor | None = None
) -> Folded:
    """With negative poles closed. `threshold`, `offset` [d_sae]."""
    closed = torch.full_like(threshold, torch.inf)
    shift = torch.zeros_like(threshold) if offset is None else offset
    both = torch.stack([shift, torch.zeros_like(shift)])
    return Folded(W_enc, b_enc, W_dec, b_dec, torch.stack([threshold, closed]), both, torch.ones_like(threshold))
