"""int8 rows: x is stored as q, with x = q * row * dim.

`dim` [d_in] is each dimension's root mean square over the counted rows of the shard, `row` the largest |x / dim| of the
row over 127. The scales of dimensions absorb outlier dimensions, those of rows absorb outlier tokens. Both are float32,
so that no row is too large or too small for them. |x - q * row * dim| is at most half of row * dim.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVELS = 127


def dim_scale(sum_of_squares: NDArray[np.float64], rows: int) -> NDArray[np.float32]:
    """The scale of each dimension [d_in]: the root mean square, or one where a dimension is always zero (or no row
    counts)."""
    rms = np.sqrt(sum_of_squares / max(1, rows)).astype("<f4")
    return np.where(rms > 0, rms, np.float32(1))


def quantise(x: NDArray[np.float32], dim: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Returns (q [n, d_in], row [n]) of float32 rows. A row with a NaN or an infinity in it becomes NaN."""
    scaled = x / dim
    row = np.abs(scaled).max(axis=1, initial=0) / np.float32(LEVELS)
    lost = ~np.isfinite(row)
    scaled[lost], row[lost | (row == 0)] = 0, 1
    np.divide(scaled, row[:, None], out=scaled)
    row[lost] = np.nan
    return np.rint(scaled, out=scaled).clip(-LEVELS, LEVELS).astype("i1"), row.astype("<f4")


def dequantise(q: NDArray[Any], row: NDArray[np.float32], dim: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns float32 rows [n, d_in]; `dim` is [d_in] or [n, d_in]."""
    with np.errstate(invalid="ignore", over="ignore"):  # a scale may be infinite
        return q.astype("<f4") * row[:, None] * dim
