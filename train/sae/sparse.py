"""The gated families' gradients from their open entries alone: one dense matrix product, the rest gathers.

Once L0 is far below d_sae, of the seven products of `GatedFamily.gradients` only u = (x - b_dec) W_encᵀ needs every
latent: where no gate is open every other term is zero, in the code as in the auxiliary path. The open entries are found
once a step, in two orders, by latent and by token; each remaining product is a weighted sum of rows or one dot product
an entry: Triton kernels on CUDA (`train/sae/kernels.py`), `embedding_bag` and its derivative elsewhere. Equal to the
dense form up to the order of sums. Unit decoders only: the gradient of a free one is dense.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
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
    token_bounds: Int[Tensor, " batch_and_1"]
    """Where each token's entries begin in that order; last, how many entries there are."""
    latent_bounds: Int[Tensor, " d_sae_and_1"]

    def sum_by_token(
        self, weights: Sequence[Float[Tensor, " n"]], rows: Float[Tensor, "d_sae d_in"]
    ) -> list[Float[Tensor, "batch d_in"]]:
        """For one or two weights: Σ over a token's entries of weight · the latent's row."""
        ordered = [weight[self.by_token] for weight in weights]
        return sum_rows(self.latent[self.by_token], self.token_bounds, ordered, [rows] * len(weights))

    def sum_by_latent(
        self, weights: Sequence[Float[Tensor, " n"]], rows: Sequence[Float[Tensor, "batch d_in"]]
    ) -> list[Float[Tensor, "d_sae d_in"]]:
        """For one or two weights, each with rows of its own: Σ over a latent's entries of weight · the token's row."""
        return sum_rows(self.token, self.latent_bounds, weights, rows)

    def dots(
        self, tokens: Sequence[Float[Tensor, "batch d_in"]], latents: Float[Tensor, "d_sae d_in"]
    ) -> list[Float[Tensor, " n"]]:
        """For one or two tables of tokens' rows: the product of each entry's row there and its latent's row."""
        if has_kernels(self.u.device.type):
            from train.sae.kernels import dot_rows

            return dot_rows(self.by_token, self.token, self.latent, tokens, latents)
        return [
            torch.ops.aten._embedding_bag_per_sample_weights_backward(
                latents, table, self.token, self.latent_bounds[:-1], self.latent, 0
            )  # what the derivative of `embedding_bag` by its weights is
            for table in tokens
        ]

    def total(self, value: Float[Tensor, " n"]) -> Float[Tensor, " d_sae"]:
        """Sums over each latent's entries."""
        return torch.zeros(len(self.latent_bounds) - 1, device=value.device).index_add_(0, self.latent, value)

    def total_by_pole(self, value: Float[Tensor, " n"], poles: int) -> Float[Tensor, "poles d_sae"]:
        if poles == 1:
            return self.total(value)[None]
        negative = self.u < 0
        return torch.stack(
            [self.total(value.masked_fill(negative, 0.0)), self.total(value.masked_fill(~negative, 0.0))]
        )


@cache
def has_kernels(device: str) -> bool:
    """Whether Triton computes the sums on this kind of device: on CUDA, where it is installed."""
    return device == "cuda" and importlib.util.find_spec("triton") is not None


def sum_rows(
    index: Int[Tensor, " n"],
    bounds: Int[Tensor, " bounds"],
    weights: Sequence[Float[Tensor, " n"]],
    rows: Sequence[Float[Tensor, "height d_in"]],
) -> list[Float[Tensor, "segments d_in"]]:
    """For each weight: Σ over each segment's entries of weight · the row that `index` names."""
    if has_kernels(index.device.type):
        from train.sae import kernels

        return kernels.sum_rows(index, bounds, weights, rows)
    pairs = zip(weights, rows, strict=True)
    starts = bounds[:-1]
    return [embedding_bag(index, table, starts, mode="sum", per_sample_weights=weight) for weight, table in pairs]


def open_entries(family: GatedFamily, w: GatedWeights, low: Float[Tensor, "batch d_in"]) -> Open:
    """`low` is x - b_dec, in the type that products are taken in."""
    batch, d_sae = len(low), len(w.W_enc)
    block = max(1, (BLOCK if low.device.type == "cpu" else GPU_BLOCK) // batch)
    find = find_open if has_kernels(low.device.type) else by_comparison
    found = []
    for first in range(0, d_sae, block):
        rows = slice(first, first + block)
        latent, *rest = find(family, w.W_enc[rows].to(low.dtype) @ low.T, w.theta[:, rows])
        found.append((latent + first if first else latent, *rest))
    latent, token, values = found[0] if len(found) == 1 else (torch.cat(parts) for parts in zip(*found, strict=True))
    short = token.dtype == torch.int32 and batch < 1 << 15
    ordered, by_token = torch.sort(token.short() if short else token, stable=True)
    return Open(latent, token, values, by_token, bounds(ordered, batch), bounds(latent, d_sae))


Entries = tuple[Int[Tensor, " n"], Int[Tensor, " n"], Float[Tensor, " n"]]
"""Latent, token and u."""


def by_comparison(
    family: GatedFamily, u: Float[Tensor, "latents batch"], theta: Float[Tensor, "poles latents"]
) -> Entries:
    u = u.float()
    latent, token = above(family, u, theta).nonzero(as_tuple=True)
    return latent, token, u[latent, token]


def find_open(family: GatedFamily, u: Float[Tensor, "latents batch"], theta: Float[Tensor, "poles latents"]) -> Entries:
    """The same by Triton; latents and tokens are int32."""
    from train.sae import entries

    return entries.find_open(u, theta, family.signed)


def above(family: GatedFamily, u: Float[Tensor, "latents batch"], theta: Float[Tensor, "poles latents"]) -> Tensor:
    """Where a gate is open."""
    if not family.signed:
        return u > theta[0][:, None]
    if len(theta) == 1:
        return u.abs() > theta[0][:, None]
    return (u > theta[0][:, None]) | (u < -theta[1][:, None])


def bounds(ordered: Int[Tensor, " n"], size: int) -> Int[Tensor, " size_and_1"]:
    """Where each value's entries begin; last, how many there are. Never waits for the device."""
    return torch.searchsorted(ordered, torch.arange(size + 1, dtype=ordered.dtype, device=ordered.device))


def of_entries(scalars: Float[Tensor, "poles d_sae"], entries: Open) -> Float[Tensor, " n"]:
    """The row of `pole`, entry by entry."""
    return pole(scalars[:, entries.latent], entries.u)


def sparse_gradients(
    family: GatedFamily, w: GatedWeights, x: Float[Tensor, "batch d_in"], now: Now
) -> tuple[GatedWeights, Step]:
    """What `family.gradients` gives. Waits for the device: how many entries are open decides the shapes."""
    if has_kernels(x.device.type):
        return kernel_gradients(family, w, x, now)
    batch = len(x)
    centred = x - w.b_dec
    at = open_entries(family, w, centred.to(now.matmul))
    a, s = family.size(at.u)
    sign = torch.ones_like(a) if s is None else s
    scale = torch.exp(of_entries(w.r, at))
    g = a - of_entries(w.theta, at)
    f = torch.relu(scale * a + of_entries(w.b, at))
    active = f.sign()

    codes = [f * sign, g * sign] if family.config.aux else [f * sign]
    error, *aux_error = [decoded.sub_(centred) for decoded in at.sum_by_token(codes, w.W_dec)]
    of_error, *of_aux_error = at.dots([error, *aux_error], w.W_dec)
    to_magnitude = of_error * sign * active * (2 / batch)
    to_gate = torch.zeros_like(a) + now.sparsity / batch
    auxiliary = torch.zeros((), device=x.device)
    if aux_error:
        to_gate += of_aux_error[0] * sign * (2 / batch)
        auxiliary = aux_error[0].square().sum() / batch
    to_u = (to_gate + scale * to_magnitude) * sign
    to_W_enc, to_W_dec = at.sum_by_latent([to_u, codes[0] * (2 / batch)], [centred, error])
    grads = GatedWeights(
        W_enc=to_W_enc,
        W_dec=to_W_dec,
        b_dec=error.sum(0) * (2 / batch) - at.total(to_u) @ w.W_enc,
        theta=-at.total_by_pole(to_gate, len(w.theta)),
        r=torch.exp(w.r) * at.total_by_pole(to_magnitude * a, len(w.r)),
        b=at.total_by_pole(to_magnitude, len(w.b)),
    )
    fired = at.total(active) > 0
    step = Step(error.square().sum() / batch, g.sum() / batch, auxiliary, active.sum() / batch, fired)
    return grads, step


def kernel_gradients(
    family: GatedFamily, w: GatedWeights, x: Float[Tensor, "batch d_in"], now: Now
) -> tuple[GatedWeights, Step]:
    """`sparse_gradients` in a few Triton kernels. Rows of W_dec, of the errors and of x - b_dec are read in
    `now.matmul`, as the dense form's products take them in; codes, sums and u's other uses are float32."""
    from train.sae.entries import codes_of, finish_errors, latent_gradients

    batch = len(x)
    centred = x - w.b_dec
    low, W_dec = centred.to(now.matmul), w.W_dec.to(now.matmul)
    at = open_entries(family, w, low)
    (f, g), ordered, latent = codes_of(at.u, at.latent, at.by_token, (w.theta, w.r, w.b), family.signed)
    codes = list(ordered) if family.config.aux else [ordered[0]]
    errors = sum_rows(latent, at.token_bounds, codes, [W_dec] * len(codes))
    low_errors, squares = finish_errors(errors, centred, now.matmul)
    of_errors = at.dots(low_errors, W_dec)
    price = on_device(now.sparsity, x.device)
    aux = of_errors[1] if family.config.aux else None
    found = latent_gradients(
        at.u, f, g, of_errors[0], aux, at.latent_bounds, w.r, len(w.theta), price, batch, family.signed
    )
    to_W_enc, to_W_dec = at.sum_by_latent([found.to_u, found.to_rows], [low, low_errors[0]])
    to_u, _, active = found.total
    loss, (_, penalty, l0) = squares.sum(1) / batch, found.total.sum(1) / batch
    to_b_dec = errors[0].sum(0) * (2 / batch) - to_u @ w.W_enc
    grads = GatedWeights(to_W_enc, to_W_dec, to_b_dec, found.theta, found.r, found.b)
    auxiliary = loss[1] if family.config.aux else torch.zeros((), device=x.device)
    return grads, Step(loss[0], penalty, auxiliary, l0, active > 0)


def on_device(value: float | Float[Tensor, ""], device: torch.device) -> Float[Tensor, ""]:
    """Without a wait for the device."""
    return value if isinstance(value, Tensor) else torch.full((), value, device=device)
