"""The one definition of a random order, used for rows in a shard, chunks in an epoch and held-out contexts.

A stable argsort of raw Philox words: numpy promises the words for ever, but not its own `permutation`.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

SHARD_ROWS: Final = 1
EPOCH_CHUNKS: Final = 2
WINDOW_ROWS: Final = 3
HELDOUT: Final = 4
DOCUMENTS: Final = 5


def philox(seed: int, *purpose: int) -> np.random.Philox:
    """A bit generator of its own for every (seed, purpose, ...): no two are shifted copies of one another."""
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=purpose))


def permutation(n: int, seed: int, *purpose: int) -> NDArray[np.int64]:
    """A permutation of 0..n-1 that depends on (n, seed, purpose) alone, on every platform and numpy version."""
    return np.argsort(philox(seed, *purpose).random_raw(n), kind="stable")
