"""The code of one block of latents on one shard, by pole: what the accumulators take in.

A pole is one side of a latent: pole 2·i of a signed autoencoder is latent i above zero, pole 2·i + 1 below. Where
latents carry no sign, pole i is latent i.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from train.features.encode import BlockCode
from train.features.shard_rows import OrderedRows

WINDOW: Final = 32
"""Tokens of a window of text around a firing."""
BEFORE: Final = 20
"""Tokens of it that stand before the firing."""
DRAWN_BEFORE, DRAWN_AFTER = 11, 4
"""Tokens before and after a drawn firing that are written of its window."""
LARGEST_HALF: Final = float(np.finfo(np.float16).max)
PLACE_BITS: Final = 44
"""Bits of a place in a key (latent, place). A store has at most 2^40 tokens."""


@dataclass(frozen=True)
class PoleCode:
    """Firings of one block of latents, by pole and then in token order. All arrays are [firings]."""

    code: BlockCode
    rows: OrderedRows
    context: int
    """Tokens of a context."""
    sides: int
    """Poles of a latent: 2 where latents carry a sign, else 1."""

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """The order of the firings by pole, as indexes into `code`."""
        if self.sides == 1:
            return np.arange(len(self.code))
        both = 2 * self.code.latent.astype(np.uint16) + (self.code.value < 0)
        return np.argsort(both.astype(np.uint16), kind="stable")

    @cached_property
    def latent(self) -> NDArray[np.int64]:
        """Within the block."""
        return self.code.latent[self.order].astype(np.int64)

    @cached_property
    def value(self) -> NDArray[np.float32]:
        return self.code.value[self.order]

    @cached_property
    def size(self) -> NDArray[np.float32]:
        return np.abs(self.value)

    @cached_property
    def pole(self) -> NDArray[np.int64]:
        """The pole's number in the whole autoencoder."""
        own = self.latent if self.sides == 1 else 2 * self.latent + (self.value < 0)
        return own + self.sides * self.code.first

    @cached_property
    def place(self) -> NDArray[np.int64]:
        """In the token stream."""
        return self.rows.places[self.code.row[self.order]]

    @cached_property
    def keys(self) -> NDArray[np.int64]:
        """(latent, place) of the entries of `code`, rising."""
        return self.code.latent.astype(np.int64) << PLACE_BITS | self.rows.places[self.code.row]

    def windows(self, which: NDArray[np.int64]) -> NDArray[np.float16]:
        """Returns the signed values of the latent around some firings, as far as the context and the shard go:
        [len(which), WINDOW]."""
        return windows_in(self.keys, self.code.value, self.latent[which], self.place[which], self.context)


def windows_in(
    keys: NDArray[np.int64],
    values: NDArray[np.float32],
    latent: NDArray[np.int64],
    place: NDArray[np.int64],
    context: int,
) -> NDArray[np.float16]:
    """Returns the values of a latent on the WINDOW tokens around a place, BEFORE of them before it; zero outside its
    context. `keys`: (latent, place) of the `values`, rising."""
    low = np.maximum(place - BEFORE, place - place % context)
    high = np.minimum(place + WINDOW - BEFORE, place - place % context + context)
    begin = np.searchsorted(keys, latent << PLACE_BITS | low)
    count = np.searchsorted(keys, latent << PLACE_BITS | high) - begin
    found = np.zeros((len(place), WINDOW), np.float16)
    owner = np.repeat(np.arange(len(place)), count)
    entry = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(begin, count)
    column = (keys[entry] & ((1 << PLACE_BITS) - 1)) - place[owner] + BEFORE
    found[owner, column] = np.clip(values[entry], -LARGEST_HALF, LARGEST_HALF)
    return found
