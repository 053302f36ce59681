"""The gated families' gradients from their open entries alone: one dense matrix product, the rest gathers.

Once L0 is far below d_sae, of the seven products of `GatedFamily.gradients` only u = (x - b_dec) W_encᵀ needs every
latent: where no gate is open every other term is zero, in the code as in the auxiliary path. The open entries are found
once a step, in two orders, by latent and by token; each remaining product is a weighted sum of rows or one dot product
an entry. Equal to the dense form up to the order of sums. Unit decoders only: the gradient of a free one is dense.
"""

from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from train.sae.base import Now, Step
from train.sae.gated import GatedFamily, GatedWeights, pole

BLOCK: Final = 1 << 20
"""Entries of u that are computed, compared and forgotten together, while they are in a CPU's cache."""
GPU_BLOCK: Final = 1 << 28


@dataclass(frozen=True)
class Open:
    """The entries of u [batch, d_sae] whose gate is open, ordered by latent, then token."""

    latent: Int[Tensor, " n"]
    token: Int[Tensor, " n"]
    u: Float[Tensor, " n"]
    by_token: Int[Tensor, " n"]
    """Which entries come one after another when ordered by token, then latent."""
    token_starts: Int[Tensor, " batch"]
    latent_starts: Int[Tensor, " d_sae"]

    def sum_by_token(self, weight: Float[Tensor, " n"], rows: Float[Tensor, "d_sae d_in"]) -> Tensor:
        """Σ over a token's entries of weight · the latent's row: [batch, d_in]."""
        which = self.latent[self.by_token]
        return embedding_bag(which, rows, self.token_starts, mode="sum", per_sample_weights=weight[self.by_token])

    def sum_by_latent(self, weight: Float[Tensor, " n"], rows: Float[Tensor, "batch d_in"]) -> Tensor:
        """Σ over a latent's entries of weight · the token's row: [d_sae, d_in]."""
        return embedding_bag(self.token, rows, self.latent_starts, mode="sum", per_sample_weights=weight)

    def dots(self, tokens: Float[Tensor, "batch d_in"], latents: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, " n"]:
        """The product of each entry's two rows; what the derivative of `embedding_bag` by its weights is."""
        product: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            latents, tokens, self.token, self.latent_starts, self.latent, 0
        )
        return product

    def total(self, value: Float[Tensor, " n"]) -> Float[Tensor, " d_sae"]:
        """Sums over each latent's entries."""
        return torch.zeros(len(self.latent_starts), device=value.device).index_add_(0, self.latent, value)

    def total_by_pole(self, value: Float[Tensor, " n"], poles: int) -> Float[Tensor, "poles d_sae"]:
        if poles == 1:
            return self.total(value)[None]
        negative = self.u < 0
        return torch.stack(
            [self.total(value.masked_fill(negative, 0.0)), self.total(value.masked_fill(~negative, 0.0))]
        )


def open_entries(family: GatedFamily, w: GatedWeights, low: Float[Tensor, "batch d_in"]) -> Open:
    """`low` is x - b_dec, in the type that products are taken in."""
    batch, d_sae = len(low), len(w.W_enc)
    block = max(1, (BLOCK if low.device.type == "cpu" else GPU_BLOCK) // batch)
    found = []
    for first in range(0, d_sae, block):
        rows = slice(first, first + block)
        u = (w.W_enc[rows].to(low.dtype) @ low.T).float()
        latent, token = above(family, u, w.theta[:, rows]).nonzero(as_tuple=True)
        found.append((latent + first, token, u[latent, token]))
    latent, token, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Open(
        latent, token, values, torch.argsort(token, stable=True), starts(token, batch), starts(latent, d_sae)
    )  # fmt: skip


def above(family: GatedFamily, u: Float[Tensor, "latents batch"], theta: Float[Tensor, "poles latents"]) -> Tensor:
    """Where a gate is open."""
    if not family.signed:
        return u > theta[0][:, None]
    if len(theta) == 1:
        return u.abs() > theta[0][:, None]
    return (u > theta[0][:, None]) | (u < -theta[1][:, None])


def starts(index: Int[Tensor, " n"], size: int) -> Int[Tensor, " size"]:
    """Where each value's entries begin once ordered by value."""
    ends = torch.bincount(index, minlength=size).cumsum(0)
    return torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])


def of_entries(scalars: Float[Tensor, "poles d_sae"], entries: Open) -> Float[Tensor, " n"]:
    """The row of `pole`, entry by entry."""
    return pole(scalars[:, entries.latent], entries.u)


def sparse_gradients(
    family: GatedFamily, w: GatedWeights, x: Float[Tensor, "batch d_in"], now: Now
) -> tuple[GatedWeights, Step]:
    """What `family.gradients` gives. Waits for the device: how many entries are open decides the shapes."""
    batch = len(x)
    centred = x - w.b_dec
    at = open_entries(family, w, centred.to(now.matmul))
    a, s = family.size(at.u)
    sign = torch.ones_like(a) if s is None else s
    scale = torch.exp(of_entries(w.r, at))
    g = a - of_entries(w.theta, at)
    f = torch.relu(scale * a + of_entries(w.b, at))
    active = f.sign()

    error = at.sum_by_token(f * sign, w.W_dec) - centred
    to_magnitude = at.dots(error, w.W_dec) * sign * active * (2 / batch)
    to_gate = torch.full_like(a, float(now.sparsity) / batch)
    auxiliary = torch.zeros((), device=x.device)
    if family.config.aux:
        aux_error = at.sum_by_token(g * sign, w.W_dec) - centred
        to_gate += at.dots(aux_error, w.W_dec) * sign * (2 / batch)
        auxiliary = aux_error.square().sum() / batch
    to_u = (to_gate + scale * to_magnitude) * sign
    grads = GatedWeights(
        W_enc=at.sum_by_latent(to_u, centred),
        W_dec=at.sum_by_latent(f * sign * (2 / batch), error),
        b_dec=error.sum(0) * (2 / batch) - at.total(to_u) @ w.W_enc,
        theta=-at.total_by_pole(to_gate, len(w.theta)),
        r=torch.exp(w.r) * at.total_by_pole(to_magnitude * a, len(w.r)),
        b=at.total_by_pole(to_magnitude, len(w.b)),
    )
    fired = at.total(active) > 0
    step = Step(error.square().sum() / batch, g.sum() / batch, auxiliary, active.sum() / batch, fired)
    return grads, step
