"""How the directions of a decoder lie to each other: repeats, and pairs that point opposite ways.

Two latents of a dictionary without signs whose decoder rows are antipodal do the work of one signed latent, so the
number of such pairs is how many latents a signed dictionary would save.
"""

from typing import Any, Final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from train.census import histogram

COSINES_AT_A_TIME: Final = 1 << 26
PARALLEL: Final = 0.9
"""|cosine| above which two directions count as one line."""
COSINE_EDGES: Final = [round(tenth / 10, 1) for tenth in range(-10, 11)]


def extremes(
    directions: Float[Tensor, "n d_in"],
) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"], Float[Tensor, " n"], Int[Tensor, " n"]]:
    """For each direction the largest cosine to another one and whose it is, then the smallest and whose. Needs n >= 2.
    Cosines are computed a block of rows at a time, so that no n x n matrix exists."""
    unit = directions / directions.norm(dim=1, keepdim=True).clamp_min(1e-8)
    n = len(unit)
    found: list[tuple[Tensor, ...]] = []
    for start in range(0, n, max(1, COSINES_AT_A_TIME // n)):
        block = unit[start : start + max(1, COSINES_AT_A_TIME // n)]
        cosines = block @ unit.T
        rows = torch.arange(len(block), device=unit.device)
        cosines[rows, rows + start] = -torch.inf
        nearest = cosines.max(dim=1)
        cosines[rows, rows + start] = torch.inf
        farthest = cosines.min(dim=1)
        found.append((nearest.values, nearest.indices, farthest.values, farthest.indices))
    nearest_cos, nearest_at, farthest_cos, farthest_at = (torch.cat(parts) for parts in zip(*found, strict=True))
    return nearest_cos, nearest_at, farthest_cos, farthest_at


def mutual_pairs(partner: Int[Tensor, " n"], counts: Tensor) -> int:
    """How many pairs name each other, both of them counting. (A pair is seen twice.)"""
    here = torch.arange(len(partner), device=partner.device)
    return int(((partner[partner] == here) & counts & counts[partner]).sum()) // 2


def directions(W_dec: Float[Tensor, "n d_in"]) -> dict[str, Any]:
    """Histograms of every row's largest and smallest cosine to another row, and the pairs of mutual extremes: antipodal
    (cosine < -0.9) and repeated (> 0.9). Give the live latents' rows: a dead latent's row is whatever it was."""
    n = len(W_dec)
    found = {"latents": n, "edges": COSINE_EDGES, "nearest": None, "farthest": None}
    if n < 2:
        return {**found, "antipodal_pairs": 0, "repeated_pairs": 0}
    nearest, nearest_at, farthest, farthest_at = extremes(W_dec)
    return {
        **found,
        "nearest": histogram(nearest, COSINE_EDGES),
        "farthest": histogram(farthest, COSINE_EDGES),
        "antipodal_pairs": mutual_pairs(farthest_at, farthest < -PARALLEL),
        "repeated_pairs": mutual_pairs(nearest_at, nearest > PARALLEL),
    }
