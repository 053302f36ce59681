"""The gated families' gradients from their open entries alone: one dense matrix product, the rest gathers.

Once L0 is far below d_sae, of the seven products of `GatedFamily.gradients` only u = (x - b_dec) W_encᵀ needs every
latent: where no gate is open every other term is zero, in the code as in the auxiliary path. The open entries are found
once a step, in two orders, by latent and by token; each remaining product is a weighted sum of rows or one dot product
an entry: Triton kernels on CUDA (`train/sae/sparse/gpu.py`), `embedding_bag` and its derivative elsewhere. Equal to the
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
SPARE: Final = 4096
"""Open entries that there is room for beside a quarter more than there were."""
LONGEST_ROW: Final = 16384
"""Of the rows that Triton works on: one program holds a row in registers."""


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


@dataclass(frozen=True)
class Sum:
    """A gradient [d_sae, d_in] that is not summed yet: over each latent's entries, weight · the token's row."""

    index: Int[Tensor, " n"]
    """Tokens."""
    latent: Int[Tensor, " n"]
    bounds: Int[Tensor, " d_sae_and_1"]
    weight: Float[Tensor, " n"]
    rows: Float[Tensor, "batch d_in"]

    def taken(self) -> Float[Tensor, "d_sae d_in"]:
        from train.sae.sparse.kernels import sum_rows

        return sum_rows(self)


Gradients = dict[str, Tensor | Sum]
"""By the weights' names."""


def summed(gradients: Gradients) -> dict[str, Tensor]:
    return {name: part.taken() if isinstance(part, Sum) else part for name, part in gradients.items()}


@dataclass
class Room:
    """For how many open entries the kernels' lists have room: what the last step needed and more; 0: not known yet."""

    entries: int = 0

    def held(self, entries: int) -> bool:
        """Whether a step's entries had room. From now on there is more, if not, and less, if that was far too much."""
        enough = entries <= self.entries
        if not enough or 2 * entries + SPARE < self.entries:
            self.entries = entries + entries // 4 + SPARE
        return enough


@cache
def has_kernels(device: str, d_in: int = 1) -> bool:
    """Whether Triton computes the sparse step and Adam's update there: on CUDA, where it is installed, unless rows are
    too long for one program."""
    return device == "cuda" and d_in <= LONGEST_ROW and importlib.util.find_spec("triton") is not None


def sum_rows(
    index: Int[Tensor, " n"],
    bounds: Int[Tensor, " bounds"],
    weights: Sequence[Float[Tensor, " n"]],
    rows: Sequence[Float[Tensor, "height d_in"]],
) -> list[Float[Tensor, "segments d_in"]]:
    """For each weight: Σ over each segment's entries of weight · the row that `index` names."""
    pairs = zip(weights, rows, strict=True)
    starts = bounds[:-1]
    return [embedding_bag(index, table, starts, mode="sum", per_sample_weights=weight) for weight, table in pairs]


def open_entries(family: GatedFamily, w: GatedWeights, low: Float[Tensor, "batch d_in"]) -> Open:
    """`low` is x - b_dec, in the type that products are taken in."""
    batch, d_sae = len(low), len(w.W_enc)
    block = max(1, (BLOCK if low.device.type == "cpu" else GPU_BLOCK) // batch)
    found = []
    for first in range(0, d_sae, block):
        rows = slice(first, first + block)
        u = (w.W_enc[rows].to(low.dtype) @ low.T).float()
        latent, token = above(family, u, w.theta[:, rows]).nonzero(as_tuple=True)
        found.append((latent + first if first else latent, token, u[latent, token]))
    latent, token, values = found[0] if len(found) == 1 else (torch.cat(parts) for parts in zip(*found, strict=True))
    ordered, by_token = torch.sort(token, stable=True)
    return Open(latent, token, values, by_token, bounds(ordered, batch), bounds(latent, d_sae))


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
    """What `family.gradients` gives."""
    if has_kernels(x.device.type, x.shape[1]):
        from train.sae.sparse.gpu import kernel_gradients

        rounded = w.W_enc.to(now.matmul), w.W_dec.to(now.matmul)
        unsummed, step = kernel_gradients(family, w, x, now, rounded, Room())
        return GatedWeights(**summed(unsummed)), step
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


def on_device(value: float | Float[Tensor, ""], device: torch.device) -> Float[Tensor, ""]:
    """Without a wait for the device."""
    return value if isinstance(value, Tensor) else torch.full((), value, device=device)
