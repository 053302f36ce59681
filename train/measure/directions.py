"""How the directions of a decoder lie to each other: repeats, and pairs that point opposite ways.

Two latents of a dictionary without signs whose decoder rows are antipodal do the work of one signed latent, so the
number of such pairs is how many latents a signed dictionary would save.
"""

from typing import Any, Final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from train.measure.census import histogram

COSINES_AT_A_TIME: Final = 1 << 26
AT_MOST: Final = 1 << 28
"""Cosines that are computed: all of 16,384 directions. Of more, a sample is set against all: 4,096 of 65,536."""
FEWEST: Final = 256
"""Directions in a sample."""
PARALLEL: Final = 0.9
"""|cosine| above which two directions count as one line."""
COSINE_EDGES: Final = [round(tenth / 10, 1) for tenth in range(-10, 11)]


def extremes(
    directions: Float[Tensor, "n d_in"], which: Int[Tensor, " m"] | None = None
) -> tuple[Float[Tensor, " m"], Int[Tensor, " m"], Float[Tensor, " m"], Int[Tensor, " m"]]:
    """For each direction (of those numbered in `which`) the largest cosine to another one and whose it is, then the
    smallest and whose. Needs n >= 2. Cosines are computed a block of rows at a time, so that no m x n matrix exists."""
    unit = directions / directions.norm(dim=1, keepdim=True).clamp_min(1e-8)
    n = len(unit)
    which = torch.arange(n, device=unit.device) if which is None else which
    found: list[tuple[Tensor, ...]] = []
    for some in torch.split(which, max(1, COSINES_AT_A_TIME // n)):
        cosines = unit[some] @ unit.T
        rows = torch.arange(len(some), device=unit.device)
        cosines[rows, some] = -torch.inf
        nearest = cosines.max(dim=1)
        cosines[rows, some] = torch.inf
        farthest = cosines.min(dim=1)
        found.append((nearest.values, nearest.indices, farthest.values, farthest.indices))
    nearest_cos, nearest_at, farthest_cos, farthest_at = (torch.cat(parts) for parts in zip(*found, strict=True))
    return nearest_cos, nearest_at, farthest_cos, farthest_at


def mutual_pairs(partner: Int[Tensor, " n"], counts: Tensor) -> int:
    """How many pairs name each other, both of them counting. (A pair is seen twice.)"""
    here = torch.arange(len(partner), device=partner.device)
    return int(((partner[partner] == here) & counts & counts[partner]).sum()) // 2


def directions(W_dec: Float[Tensor, "n d_in"], seed: int = 0) -> dict[str, Any]:
    """Histograms of every row's largest and smallest cosine to another row, and the pairs of mutual extremes: antipodal
    (cosine < -0.9) and repeated (> 0.9). Give the live latents' rows: a dead latent's row is whatever it was.

    Of a wide dictionary a sample of `sampled` rows, drawn with `seed`, is set against all: the histograms are of the
    sample, the numbers of pairs are estimates for the whole."""
    n = len(W_dec)
    sampled = max(FEWEST, AT_MOST // n) if n * n > AT_MOST else None
    found = {"latents": n, "sampled": sampled, "edges": COSINE_EDGES, "nearest": None, "farthest": None}
    if n < 2:
        return {**found, "antipodal_pairs": 0, "repeated_pairs": 0}
    if sampled:
        draw = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:sampled].to(W_dec.device)
        nearest, nearest_at, farthest, farthest_at = extremes(W_dec, draw)
        antipodal = estimated_pairs(W_dec, draw, farthest_at, farthest < -PARALLEL, 3)
        repeated = estimated_pairs(W_dec, draw, nearest_at, nearest > PARALLEL, 1)
    else:
        nearest, nearest_at, farthest, farthest_at = extremes(W_dec)
        antipodal = mutual_pairs(farthest_at, farthest < -PARALLEL)
        repeated = mutual_pairs(nearest_at, nearest > PARALLEL)
    return {
        **found,
        "nearest": histogram(nearest, COSINE_EDGES),
        "farthest": histogram(farthest, COSINE_EDGES),
        "antipodal_pairs": antipodal,
        "repeated_pairs": repeated,
    }


def estimated_pairs(W_dec: Tensor, draw: Tensor, partner: Tensor, counts: Tensor, partners: int) -> int:
    """The number of mutual pairs in the whole, from how many of the sampled rows have a partner that names them.
    `partners`: where `extremes` says whose the extreme cosine is."""
    if not counts.any():
        return 0
    back = extremes(W_dec, partner[counts])[partners]
    return round(int((back == draw[counts]).sum()) * len(W_dec) / len(draw) / 2)
