"""Open entries: where a gate is open, in lists ordered by latent and by token, and sums over them."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from train.sae.gated import GatedFamily, pole

BLOCK: Final = 1 << 20
"""Entries of u that are computed, compared and forgotten together, while they are in a CPU's cache."""
GPU_BLOCK: Final = 1 << 28
SPARE: Final = 4096
"""Capacity for open entries, in addition to 1.25 times their last number."""
LONGEST_ROW: Final = 16384
"""Longest row that Triton works on: one program holds a row in registers."""


@dataclass(frozen=True)
class OpenEntries:
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
class UnsummedGradient:
    """A gradient [d_sae, d_in] that is not summed yet: over each latent's entries, weight · the token's row."""

    index: Int[Tensor, " n"]
    """Tokens."""
    latent: Int[Tensor, " n"]
    bounds: Int[Tensor, " d_sae_and_1"]
    weight: Float[Tensor, " n"]
    rows: Float[Tensor, "batch d_in"]


Gradients = dict[str, Tensor | UnsummedGradient]
"""By the weights' names."""


@dataclass
class EntryRoom:
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


def of_entries(scalars: Float[Tensor, "poles d_sae"], entries: OpenEntries) -> Float[Tensor, " n"]:
    """The row of `pole`, entry by entry."""
    return pole(scalars[:, entries.latent], entries.u)


def on_device(value: float | Float[Tensor, ""], device: torch.device) -> Float[Tensor, ""]:
    """Without a wait for the device."""
    return value if isinstance(value, Tensor) else torch.full((), value, device=device)
