"""Which rows of a corpus are marked: a bit a row, so that a corpus of a billion rows takes 125 MB."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

AT_A_TIME = 1 << 22
"""Rows whose bits are looked at together."""


@dataclass(frozen=True, eq=False)
class RowMask:
    """A mask [contexts, context] over the token stream, in bits."""

    shape: tuple[int, int]
    bits: NDArray[np.uint8]
    """Eight rows each, the first in the highest bit; zeros after the last."""

    @classmethod
    def of(cls, mask: "NDArray[np.bool_] | RowMask") -> "RowMask":
        if isinstance(mask, RowMask):
            return mask
        return cls((mask.shape[0], mask.shape[1]), np.packbits(mask))

    @classmethod
    def packed(cls, shape: tuple[int, int], blocks: Iterable[NDArray[np.bool_]]) -> "RowMask":
        """Of masks that come one after another."""
        bits, at, left = np.zeros(-(-shape[0] * shape[1] // 8), np.uint8), 0, np.empty(0, bool)
        for block in blocks:
            rows = np.concatenate([left, block.reshape(-1)]) if len(left) else block.reshape(-1)
            whole = len(rows) // 8
            bits[at : at + whole] = np.packbits(rows[: 8 * whole])
            at, left = at + whole, rows[8 * whole :].copy()
        if len(left):
            bits[at] = np.packbits(left)[0]
        return cls(shape, bits)

    def __len__(self) -> int:
        """Rows."""
        return self.shape[0] * self.shape[1]

    def __getitem__(self, rows: slice) -> NDArray[np.bool_]:
        """Of neighbouring rows of the token stream."""
        start, stop, step = rows.indices(len(self))
        assert step == 1
        first = start // 8
        found = np.unpackbits(self.bits[first : -(-stop // 8)])[start - 8 * first : max(start, stop) - 8 * first]
        return found.view(np.bool_)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, NDArray[np.bool_]]]:
        for at in range(start, stop, AT_A_TIME):
            yield at, self[at : min(stop, at + AT_A_TIME)]

    def count(self, start: int, stop: int) -> int:
        """Marked rows of a part of the token stream."""
        return sum(int(np.count_nonzero(piece)) for _, piece in self.pieces(start, stop))

    def places(self) -> NDArray[np.int64]:
        """Every marked row's place in the token stream, sorted: of few."""
        found = [np.flatnonzero(piece) + at for at, piece in self.pieces(0, len(self))]
        return np.concatenate([np.empty(0, np.int64), *found])

    def contexts(self) -> NDArray[np.int64]:
        """Those that have a marked row, sorted."""
        found = [np.unique((np.flatnonzero(piece) + at) // self.shape[1]) for at, piece in self.pieces(0, len(self))]
        return np.unique(np.concatenate([np.empty(0, np.int64), *found]))

    def shards(self, shard_rows: int, n_rows: int) -> list[int]:
        """Those that have a marked row, sorted, of shards that hold `n_rows` rows together."""
        found = [np.unique((np.flatnonzero(piece) + at) // shard_rows) for at, piece in self.pieces(0, n_rows)]
        shards: list[int] = np.unique(np.concatenate([np.empty(0, np.int64), *found])).tolist()
        return shards

    def at(self, places: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Of the rows at these places in the token stream."""
        found: NDArray[np.bool_] = (self.bits[places >> 3] & (np.uint8(128) >> (places & 7).astype(np.uint8))) != 0
        return found

    def of_contexts(self, contexts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[len(contexts), context]"""
        width = self.shape[1]
        rows = [self[at * width : (at + 1) * width] for at in contexts.tolist()]
        return np.stack(rows) if rows else np.empty((0, width), bool)

    def set_(self, places: NDArray[np.int64], marked: bool) -> None:
        """Marks the rows at these places in the token stream, or takes their marks away."""
        bits = np.uint8(128) >> (places & 7).astype(np.uint8)
        if marked:
            np.bitwise_or.at(self.bits, places >> 3, bits)
        else:
            np.bitwise_and.at(self.bits, places >> 3, ~bits)

    def without(self, places: NDArray[np.int64]) -> "RowMask":
        """The same without the rows at these places in the token stream."""
        found = RowMask(self.shape, self.bits.copy())
        found.set_(places, False)
        return found
