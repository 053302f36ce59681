"""Computes exact float64 moments of rows where the rows are: norms of all rows, sums over those that count.

On a CPU numpy works segment by segment; threads share the segments without changing a bit of the sums. torch's own
threads would spin between operations this short. On a GPU torch adds batches as they come (harvest/capture.py).
"""

import threading
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SEGMENT_ROWS: Final = 2048
"""Rows summed by one thread. Segments are added in order."""
CPU_BLOCK: Final = 1 << 21
GPU_BLOCK: Final = 1 << 28
"""Bytes of float64 processed at a time. On a CPU this fits into the caches, and two threads do not compete for the GIL
over it (at half of it, two threads were as slow as one). On a GPU it keeps the device busy."""


@dataclass(frozen=True)
class MomentsPart:
    """Rows whose moments are computed."""

    rows: NDArray[Any]
    """[n, d_in]; bfloat16 as its bit pattern."""
    keep: NDArray[np.bool_]
    """[n] True for the rows that count."""
    norms: NDArray[np.float32]
    """[n] Euclidean norms; written by `moments_on_host`."""

    def cut(self) -> list["MomentsPart"]:
        slices = [slice(at, at + SEGMENT_ROWS) for at in range(0, len(self.rows), SEGMENT_ROWS)]
        return [MomentsPart(self.rows[at], self.keep[at], self.norms[at]) for at in slices]


class MomentsScratch(threading.local):
    """Scratch memory of one thread for the rows that it works on."""

    def __init__(self) -> None:
        self.numbers = np.empty(0)
        self.squares = np.empty(0)
        self.bits = np.empty(0, np.uint32)

    def take(self, size: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.uint32]]:
        if len(self.numbers) < size:
            self.numbers, self.squares, self.bits = np.empty(size), np.empty(size), np.empty(size, np.uint32)
        return self.numbers[:size], self.squares[:size], self.bits[:size]


BLOCK: Final = MomentsScratch()


def moments_on_host(pool: Executor, parts: Sequence[MomentsPart]) -> list[NDArray[np.float64]]:
    """Returns, for each part, [2, d_in]: the sum and the sum of squares over the rows that count. A row with a NaN or
    an infinity does not count."""
    cut = [part.cut() for part in parts]
    found = pool.map(segment_moments, chain.from_iterable(cut))
    return [sum(islice(found, len(segments)), np.zeros((2, 1))) for segments in cut]


def segment_moments(part: MomentsPart) -> NDArray[np.float64]:
    n, d_in = part.rows.shape
    at_once = max(1, CPU_BLOCK // (8 * d_in))
    total = np.zeros((2, d_in))
    with np.errstate(invalid="ignore", over="ignore"):
        for at in range(0, n, at_once):
            here = slice(at, min(n, at + at_once))
            rows, norms = part.rows[here], part.norms[here]
            x, squares, bits = (memory.reshape(rows.shape) for memory in BLOCK.take(rows.size))
            if rows.dtype == np.uint16:
                np.left_shift(rows, 16, out=bits, dtype=np.uint32)
                x[...] = bits.view(np.float32)
            else:
                x[...] = rows
            np.multiply(x, x, out=squares)
            norms[...] = np.sqrt(squares.sum(1))
            left_out = np.flatnonzero(~(part.keep[here] & np.isfinite(norms)))
            x[left_out] = squares[left_out] = 0
            total[0] += x.sum(0)
            total[1] += squares.sum(0)
    return total


def add_moments_on_device(stored: Tensor, keep: Tensor, norms: Tensor, moments: Tensor) -> None:
    """Adds the same sums as `moments_on_host` to `moments` [2, d_in] float64, without a host synchronisation."""
    rows = max(1, GPU_BLOCK // (8 * stored.shape[1]))
    for x, counts, out in zip(*(torch.split(tensor, rows) for tensor in (stored, keep, norms)), strict=True):
        x = x.double()
        squares = x.square()
        out.copy_(squares.sum(1).sqrt_())
        counted = (counts & out.isfinite())[:, None]
        moments[0] += torch.where(counted, x, 0).sum(0)
        moments[1] += torch.where(counted, squares, 0).sum(0)
