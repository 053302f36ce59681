"""The few firings that are kept of every pole: the strongest, or a uniform sample, each with its window.

Which firings are kept depends on their values and places alone. Shards can therefore be read in any order, and tables
of different shards merged, with the same result.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from train.features.code import PLACE_BITS, WINDOW

NONE: Final = np.uint64(np.iinfo(np.uint64).max)
"""The rank of an empty slot."""
INFINITY: Final = np.uint64(0x7F800000)
"""The bits of infinity in float32: as whole numbers, the bits of positive floats are in the order of the floats."""
RANK_BITS: Final = 32
"""Bits of a rank."""
Rank = Callable[[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]], NDArray[np.uint64]]
Windows = Callable[[NDArray[np.int64]], NDArray[np.float16]]


def strength(pole: NDArray[np.int64], value: NDArray[np.float32], place: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Ranks firings by magnitude, the largest first."""
    del pole, place
    return INFINITY - np.abs(value).view(np.uint32).astype(np.uint64)


def lottery(pole: NDArray[np.int64], value: NDArray[np.float32], place: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Ranks firings at random, by a fixed hash of pole and place."""
    del value
    words = mixed(place.astype(np.uint64)) + pole.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return mixed(words) >> np.uint64(64 - RANK_BITS)


def mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hashes 64-bit words: two rounds of multiplication and shift that every bit passes through."""
    words = (words ^ (words >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    words = (words ^ (words >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return words ^ (words >> np.uint64(32))


@dataclass(frozen=True)
class CandidateFirings:
    """CandidateFirings that may be kept, sorted by pole and then by place."""

    pole: NDArray[np.int64]
    value: NDArray[np.float32]
    place: NDArray[np.int64]
    windows: Windows
    """Returns the windows of some of them, [n, WINDOW]."""


class Slots:
    """At most n firings of every pole: those of the smallest rank, and of equal ones those of the first place."""

    def __init__(self, poles: int, n: int, rank: Rank, context: int | None = None) -> None:
        """`context`: keep at most one firing per context of so many tokens."""
        self.n, self.rank, self.context = n, rank, context
        self.value = np.zeros((poles, n), np.float32)
        self.place = np.full((poles, n), -1, np.int64)
        self.window = np.zeros((poles, n, WINDOW), np.float16)

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        return {"value": self.value, "place": self.place, "window": self.window}

    def ranks(self, poles: slice) -> NDArray[np.uint64]:
        """The rank of every slot of some poles, [poles, n]; NONE where it is empty."""
        place, value = self.place[poles], self.value[poles]
        numbers = np.repeat(np.arange(poles.start, poles.stop), self.n)
        ranks = self.rank(numbers, value.reshape(-1), place.reshape(-1)).reshape(place.shape)
        return np.where(place < 0, NONE, ranks)

    def take(self, poles: slice, found: CandidateFirings) -> None:
        """Keeps what belongs into the slots of `poles`, in which all poles of `found` are."""
        if not (self.n and len(found.pole)):
            return
        rank = self.rank(found.pole, found.value, found.place)
        last = self.ranks(poles)[:, -1]
        limit = np.minimum(last, likely(found.pole, rank, poles, self.n, last))
        which = np.flatnonzero(rank <= limit[found.pole - poles.start])
        if self.context:
            which = which[first_of_groups(found.pole[which], found.place[which] // self.context, rank[which])]
        which = which[first_of_each(found.pole[which], rank[which], found.place[which], self.n)]
        if len(which):
            self.put(found, which)

    def put(self, found: CandidateFirings, which: NDArray[np.int64]) -> None:
        """Merges some firings, sorted by pole, with what the slots of their poles hold."""
        touched, at = np.unique(found.pole[which], return_inverse=True)
        many, held = len(touched), len(touched) * self.n
        pole = np.concatenate([np.repeat(np.arange(many), self.n), at])
        value = np.concatenate([self.value[touched].reshape(-1), found.value[which]])
        place = np.concatenate([self.place[touched].reshape(-1), found.place[which]])
        rank = self.rank(touched[pole], value, place)
        entries = np.flatnonzero(place >= 0)
        if self.context:
            entries = entries[one_of_each(pole[entries], place[entries] // self.context, rank[entries], place[entries])]
        entries = entries[first_of_each(pole[entries], rank[entries], place[entries], self.n)]
        slot = pole[entries], counted_off(pole[entries])
        values, places = np.zeros((many, self.n), np.float32), np.full((many, self.n), -1, np.int64)
        windows = np.zeros((many, self.n, WINDOW), np.float16)
        values[slot], places[slot] = value[entries], place[entries]
        new = entries >= held
        old = entries[~new]
        windows[slot[0][~new], slot[1][~new]] = self.window[touched].reshape(-1, WINDOW)[old]
        windows[slot[0][new], slot[1][new]] = found.windows(which[entries[new] - held])
        self.value[touched], self.place[touched], self.window[touched] = values, places, windows

    def merge(self, poles: slice, other: Mapping[str, NDArray[np.generic]]) -> None:
        """Merges the slots of some poles of another table, given as the arrays of `arrays`."""
        place = np.asarray(other["place"][poles]).reshape(-1).astype(np.int64)
        value = np.asarray(other["value"][poles]).reshape(-1).astype(np.float32)
        window = np.asarray(other["window"][poles]).reshape(-1, WINDOW).astype(np.float16)
        pole = np.repeat(np.arange(poles.start, poles.stop), self.n)
        held = np.flatnonzero(place >= 0)
        held = held[np.lexsort((place[held], pole[held]))]
        self.take(poles, CandidateFirings(pole[held], value[held], place[held], lambda which: window[held[which]]))


def likely(
    pole: NDArray[np.int64], rank: NDArray[np.uint64], poles: slice, n: int, last: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """Returns, for each of `poles`, a rank that at least n of its firings reach, or NONE. It makes the first shard as
    cheap as later ones for a rank that is uniform: only a guess that proves right is returned."""
    number = pole - poles.start
    many = poles.stop - poles.start
    counts = np.bincount(number, minlength=many)
    share = np.minimum(1.0, (n + 6 * np.sqrt(n) + 8) / np.maximum(counts, 1))
    guess = np.where((share < 0.5) & (last == NONE), share * 2.0**RANK_BITS, 0).astype(np.uint64)
    reached = np.bincount(number[rank <= guess[number]], minlength=many)
    return np.where(reached >= n, guess, NONE)


def first_of_groups(pole: NDArray[np.int64], group: NDArray[np.int64], rank: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Returns the index of the first entry of smallest rank of each run of equal (pole, group)."""
    if not len(pole):
        return np.empty(0, np.int64)
    starts = np.flatnonzero(is_first(pole, group))
    smallest = np.repeat(np.minimum.reduceat(rank, starts), np.diff(np.append(starts, len(pole))))
    best = np.flatnonzero(rank == smallest)
    return best[is_first(pole[best], group[best])]


def first_of_each(
    pole: NDArray[np.int64], rank: NDArray[np.uint64], place: NDArray[np.int64], n: int
) -> NDArray[np.int64]:
    """Returns the indexes of the n entries of each pole that come first by rank and place, in that order."""
    some = foremost(pole, rank, n)
    keys = pole[some] << RANK_BITS | rank[some].astype(np.int64)
    order = np.argsort(keys)
    if not is_first(keys[order]).all():
        order = np.lexsort((place[some], keys))
    order = some[order]
    return order[counted_off(pole[order]) < n]


def foremost(pole: NDArray[np.int64], rank: NDArray[np.uint64], n: int) -> NDArray[np.int64]:
    """Returns the indexes of the n entries of each pole of smallest rank, and of all whose rank equals the last one's.
    numpy sorts whole numbers ten times as fast as `lexsort` does."""
    if not len(pole):
        return np.empty(0, np.int64)
    keys = pole << RANK_BITS | rank.astype(np.int64)
    number = pole - pole.min()
    counts = np.bincount(number)
    last = np.cumsum(counts) - counts + np.minimum(counts, n) - 1
    return np.flatnonzero(keys <= np.sort(keys)[last][number])


def one_of_each(
    pole: NDArray[np.int64], context: NDArray[np.int64], rank: NDArray[np.uint64], place: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Returns the index of the entry of each (pole, context) that comes first by rank and place. Few are not alone.
    `pole` counts from 0, and has less than PLACE_BITS fewer bits than an index."""
    keys = pole << PLACE_BITS | context
    order = np.argsort(keys)
    first = is_first(keys[order])
    shared = ~first
    shared[:-1] |= ~first[1:]
    some = order[shared]
    some = some[np.lexsort((place[some], rank[some], keys[some]))]
    return np.concatenate([order[~shared], some[is_first(keys[some])]])


def is_first(*keys: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Marks the first entry of each run of equal keys."""
    marks = np.zeros(len(keys[0]), np.bool_)
    marks[:1] = True
    for key in keys:
        marks[1:] |= key[1:] != key[:-1]
    return marks


def counted_off(pole: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers the entries of each run of equal poles from 0."""
    starts = np.flatnonzero(is_first(pole))
    return np.arange(len(pole)) - np.repeat(starts, np.diff(np.append(starts, len(pole))))
