"""Counts how often two poles fire on the same token, on a sample of the tokens."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from train.features.slots import first_of_each, is_first, mixed, strength

PARTNERS: Final = 8
"""Poles listed for each pole."""
FEWEST: Final = 3
"""Tokens on which two poles must fire together to be listed."""
MOST_PAIRS: Final = 100_000_000
"""Maximum number of pairs that are counted. A few tokens on which thousands of latents fire hold most of the pairs."""
AT_A_TIME: Final = 1 << 21
"""Pairs counted at a time."""
DENSE: Final = 4
"""Counters per pair up to which all possible pairs have one; where there would be more, the pairs are sorted."""


@dataclass(frozen=True)
class Cofiring:
    """For each pole, the others that fire with it most, by falling Jaccard index. Arrays are [entries], by pole."""

    pole: NDArray[np.int64]
    other: NDArray[np.int64]
    jaccard: NDArray[np.float32]
    """Tokens on which both fire, over the tokens on which at least one does."""
    lift: NDArray[np.float32]
    """Tokens on which both fire, over the number expected of independent poles."""


def cofiring(place: NDArray[np.int64], pole: NDArray[np.int64], sides: int, poles: int, sampled: int) -> Cofiring:
    """Counts all pairs of poles that fire on the same token. `place`, `pole`: the firings on `sampled` tokens, in any
    order. Where there are more than MOST_PAIRS pairs, it counts on a random part of the tokens. The two poles of one
    latent never fire together."""
    place, pole = np.divmod(np.sort(place * poles + pole), poles)
    kept, share = affordable(place)
    place, pole, sampled = place[kept], pole[kept], round(sampled * share)
    begins = np.append(np.flatnonzero(is_first(place)), len(place))
    length = np.diff(begins)
    token = np.repeat(np.arange(len(length)), length)
    fires = np.bincount(pole, minlength=poles)
    by_pole = np.sort(pole << 32 | np.arange(len(pole))) & ((1 << 32) - 1)
    work = np.cumsum(length[token[by_pole]])
    edges = np.concatenate([[0], np.cumsum(fires)])
    found, low = [ranked(*(np.empty(0, np.int64),) * 3, fires, sampled)], 0
    while low < poles:  # as many poles as make at most AT_A_TIME pairs, at least one
        reached = np.searchsorted(work, (work[edges[low] - 1] if edges[low] else 0) + AT_A_TIME, "right")
        high = max(low + 1, int(np.searchsorted(edges, reached, "right")) - 1)
        one, other, both = pairs_of(by_pole[edges[low] : edges[high]], pole, token, begins, length, (low, high, poles))
        keep = one // sides != other // sides
        found.append(ranked(one[keep], other[keep], both[keep], fires, sampled))
        low = high
    names = ("pole", "other", "jaccard", "lift")
    return Cofiring(*(np.concatenate([getattr(each, name) for each in found]) for name in names))


def affordable(place: NDArray[np.int64]) -> tuple[NDArray[np.bool_], float]:
    """Marks the firings on as many tokens, in the order of a fixed hash, as hold MOST_PAIRS pairs together; at least
    one token. Returns the share of the tokens that are marked, too."""
    starts = np.flatnonzero(is_first(place))
    tokens, count = place[starts], np.diff(np.append(starts, len(place)))
    if (count.astype(np.int64) ** 2).sum() <= MOST_PAIRS:
        return np.ones(len(place), np.bool_), 1.0
    order = np.argsort(mixed(tokens.astype(np.uint64)), kind="stable")
    many = max(1, int(np.searchsorted(np.cumsum(count[order].astype(np.int64) ** 2), MOST_PAIRS, "right")))
    kept = np.sort(tokens[order[:many]])
    return np.isin(place, kept), len(kept) / max(1, len(tokens))


def pairs_of(
    entries: NDArray[np.int64],
    pole: NDArray[np.int64],
    token: NDArray[np.int64],
    begins: NDArray[np.int64],
    length: NDArray[np.int64],
    span: tuple[int, int, int],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Returns, for the poles of some firings, every pole that fires on at least FEWEST of the same tokens, and on how
    many. `span`: the lowest of these poles, the one behind the highest, and the number of all poles."""
    low, high, poles = span
    at = token[entries]
    count = length[at]
    first = np.repeat(begins[at] - (np.cumsum(count) - count), count)
    partner = pole[first + np.arange(len(first))]
    keys = np.repeat((pole[entries] - low) * poles, count) + partner
    if (high - low) * poles <= DENSE * len(keys):
        counts = np.bincount(keys)
        found = np.flatnonzero(counts >= FEWEST)
        both = counts[found]
    else:
        keys.sort()
        starts = np.flatnonzero(is_first(keys))
        both = np.diff(np.append(starts, len(keys)))
        found, both = keys[starts[both >= FEWEST]], both[both >= FEWEST]
    one, other = np.divmod(found, poles)
    return one + low, other, both


def ranked(
    one: NDArray[np.int64], other: NDArray[np.int64], both: NDArray[np.int64], fires: NDArray[np.int64], sampled: int
) -> Cofiring:
    """Keeps the PARTNERS pairs of each pole with the largest Jaccard index; of equal ones the first pole."""
    jaccard = (both / np.maximum(1, fires[one] + fires[other] - both)).astype(np.float32)
    lift = (both * float(sampled) / np.maximum(1.0, fires[one].astype(np.float64) * fires[other])).astype(np.float32)
    order = first_of_each(one, strength(one, jaccard, other), other, PARTNERS)
    return Cofiring(one[order], other[order], jaccard[order], lift[order])
