"""A mask over the rows of a corpus with one bit per row: a corpus of a billion rows takes 125 MB."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROWS_AT_A_TIME = 1 << 22
"""Rows whose bits are unpacked together."""


@dataclass(frozen=True, eq=False)
class RowMask:
    """A mask [contexts, context] over the token stream, in bits. A row's place is its index in the token stream."""

    shape: tuple[int, int]
    bits: NDArray[np.uint8]
    """Eight rows per byte, the first in the highest bit; zeros after the last row."""

    @classmethod
    def of(cls, mask: "NDArray[np.bool_] | RowMask") -> "RowMask":
        """Packs a boolean mask; returns a `RowMask` unchanged."""
        if isinstance(mask, RowMask):
            return mask
        return cls((mask.shape[0], mask.shape[1]), np.packbits(mask))

    @classmethod
    def packed(cls, shape: tuple[int, int], blocks: Iterable[NDArray[np.bool_]]) -> "RowMask":
        """Packs consecutive blocks of a boolean mask without holding all of it in memory."""
        bits, filled, left = np.zeros(-(-shape[0] * shape[1] // 8), np.uint8), 0, np.empty(0, bool)
        for block in blocks:
            rows = np.concatenate([left, block.reshape(-1)]) if len(left) else block.reshape(-1)
            whole = len(rows) // 8
            bits[filled : filled + whole] = np.packbits(rows[: 8 * whole])
            filled, left = filled + whole, rows[8 * whole :].copy()
        if len(left):
            bits[filled] = np.packbits(left)[0]
        return cls(shape, bits)

    def __len__(self) -> int:
        """Number of rows."""
        return self.shape[0] * self.shape[1]

    def __getitem__(self, rows: slice) -> NDArray[np.bool_]:
        """The mask of neighbouring rows of the token stream."""
        start, stop, step = rows.indices(len(self))
        assert step == 1
        first = start // 8
        found = np.unpackbits(self.bits[first : -(-stop // 8)])[start - 8 * first : max(start, stop) - 8 * first]
        return found.view(np.bool_)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, NDArray[np.bool_]]]:
        """Yields the mask of rows `start` to `stop` piece by piece, each with the place of its first row."""
        for first in range(start, stop, ROWS_AT_A_TIME):
            yield first, self[first : min(stop, first + ROWS_AT_A_TIME)]

    def count(self, start: int, stop: int) -> int:
        """Returns how many of the rows `start` to `stop` are marked."""
        return sum(int(np.count_nonzero(piece)) for _, piece in self.pieces(start, stop))

    def places(self) -> NDArray[np.int64]:
        """Returns the places of all marked rows, sorted. Use it only when few are marked: each takes 8 bytes."""
        found = [np.flatnonzero(piece) + first for first, piece in self.pieces(0, len(self))]
        return np.concatenate([np.empty(0, np.int64), *found])

    def contexts(self) -> NDArray[np.int64]:
        """Returns the contexts that have a marked row, sorted."""
        pieces = self.pieces(0, len(self))
        found = [np.unique((np.flatnonzero(piece) + first) // self.shape[1]) for first, piece in pieces]
        return np.unique(np.concatenate([np.empty(0, np.int64), *found]))

    def shards(self, shard_rows: int, n_rows: int) -> list[int]:
        """Returns the shards that have a marked row, sorted. `n_rows`: rows in all shards together."""
        found = [np.unique((np.flatnonzero(piece) + first) // shard_rows) for first, piece in self.pieces(0, n_rows)]
        shards: list[int] = np.unique(np.concatenate([np.empty(0, np.int64), *found])).tolist()
        return shards

    def marked_at(self, places: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Returns which of the rows at `places` are marked."""
        found: NDArray[np.bool_] = (self.bits[places >> 3] & (np.uint8(128) >> (places & 7).astype(np.uint8))) != 0
        return found

    def of_contexts(self, contexts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Returns the mask of some contexts: [len(contexts), context]."""
        width = self.shape[1]
        rows = [self[number * width : (number + 1) * width] for number in contexts.tolist()]
        return np.stack(rows) if rows else np.empty((0, width), bool)

    def set_(self, places: NDArray[np.int64], marked: bool) -> None:
        """Marks or unmarks the rows at `places`, in place."""
        bits = np.uint8(128) >> (places & 7).astype(np.uint8)
        if marked:
            np.bitwise_or.at(self.bits, places >> 3, bits)
        else:
            np.bitwise_and.at(self.bits, places >> 3, ~bits)

    def without(self, places: NDArray[np.int64]) -> "RowMask":
        """Returns a copy in which the rows at `places` are unmarked."""
        found = RowMask(self.shape, self.bits.copy())
        found.set_(places, False)
        return found
