"""Compares the directions of a decoder: repeated directions, and pairs of opposite directions.

In a dictionary without signs, two latents with antipodal decoder rows do the work of one signed latent. The number of
such pairs is therefore the number of latents that a signed dictionary would save.
"""

from typing import Any, Final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from train.measure.census import histogram

COSINES_AT_A_TIME: Final = 1 << 26
AT_MOST: Final = 1 << 28
"""Maximum number of cosines that are computed: all pairs of up to 16,384 directions. In a wider dictionary, a sample is
compared with all directions: 4,096 of 65,536."""
FEWEST: Final = 256
"""Minimum number of directions in a sample."""
PARALLEL: Final = 0.9
"""|cosine| above which two directions count as one line."""
COSINE_EDGES: Final = [round(tenth / 10, 1) for tenth in range(-10, 11)]


def extremes(
    directions: Float[Tensor, "n d_in"], which: Int[Tensor, " m"] | None = None
) -> tuple[Float[Tensor, " m"], Int[Tensor, " m"], Float[Tensor, " m"], Int[Tensor, " m"]]:
    """Returns, for each direction in `which` (default: all), the largest cosine to another direction and that
    direction's index, then the smallest cosine and its index. Needs n >= 2. Cosines are computed in blocks of rows, so
    that no m x n matrix exists."""
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
    """Returns the number of pairs whose members are each other's `partner` and both marked in `counts`."""
    numbers = torch.arange(len(partner), device=partner.device)
    return int(((partner[partner] == numbers) & counts & counts[partner]).sum()) // 2


def directions(W_dec: Float[Tensor, "n d_in"], seed: int = 0) -> dict[str, Any]:
    """Returns histograms of every row's largest and smallest cosine to another row, and the numbers of antipodal pairs
    (cosine < -0.9) and repeated pairs (> 0.9) of mutual extremes. Pass only the rows of live latents, because a dead
    latent's row means nothing.

    In a wide dictionary, a sample of `sampled` rows, drawn with `seed`, is compared with all rows: the histograms
    describe the sample, and the numbers of pairs are estimates for the whole dictionary."""
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
    """Estimates the number of mutual pairs in the whole dictionary from the sampled rows whose partner's own extreme
    they are. `partners`: the position in the result of `extremes` of the index wanted (1 nearest, 3 farthest)."""
    if not counts.any():
        return 0
    back = extremes(W_dec, partner[counts])[partners]
    return round(int((back == draw[counts]).sum()) * len(W_dec) / len(draw) / 2)


def neighbours(
    unit: Float[Tensor, "n d_in"], some: slice, count: int
) -> tuple[Float[Tensor, "m count"], Int[Tensor, "m count"], Float[Tensor, "m count"], Int[Tensor, "m count"]]:
    """Returns, for the rows `some` of unit directions, the `count` largest cosines to other rows and the rows' numbers,
    then the smallest ones, from the smallest up. Needs n > count."""
    cosines = unit[some] @ unit.T
    rows = torch.arange(len(cosines), device=unit.device)
    own = rows + some.start
    cosines[rows, own] = -torch.inf
    near = cosines.topk(count, dim=1)
    cosines[rows, own] = torch.inf
    far = cosines.topk(count, dim=1, largest=False)
    return near.values, near.indices, far.values, far.indices
