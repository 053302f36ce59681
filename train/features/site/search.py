"""The data of a search by token: which poles fire on a token, and how often."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from train.features.readers.folder import opened
from train.features.site.columns import numbers
from train.features.site.pack import packed, smallest

SCRIPTS: Final = 64
"""The tokens are dealt to so many scripts, by token id modulo this."""
PER_LATENT: Final = 96
"""Pairs of pole and token that the page keeps for each latent, on average."""


def token_scripts(path: Path, sides: int, firings: NDArray[np.int64], rows: NDArray[np.int64]) -> Iterator[bytes]:
    """Yields the script of each remainder. It holds the pairs that tell most: those of largest F1 = 2k / (n + c), for k
    firings of a pole on a token, n firings of the pole and c rows with the token. For each token it also says how many
    poles pairs.parquet has."""
    token, pole, count = read_pairs(path, sides)
    f1 = (2 * count / (firings[pole] + np.maximum(rows[token], count))).astype(np.float32)
    most = PER_LATENT * len(firings) // sides
    least = np.partition(f1, len(f1) - most)[len(f1) - most] if most < len(f1) else np.float32(0)
    found = np.bincount(token, minlength=len(rows))
    keep = f1 >= least
    token, pole, count, f1 = token[keep], pole[keep], count[keep], f1[keep]
    order = np.lexsort((pole, -f1, token, token % SCRIPTS))
    token, pole, count = token[order], pole[order], count[order]
    cuts = np.searchsorted(token % SCRIPTS, np.arange(SCRIPTS + 1))
    for script, (first, last) in enumerate(pairwise(cuts)):
        tokens, lengths = np.unique(token[first:last], return_counts=True)
        yield packed("tokens", {"script": script}, {
            "token": smallest(tokens),
            "lengths": smallest(lengths),
            "all": smallest(found[tokens]),
            "pole": smallest(pole[first:last]),
            "count": smallest(count[first:last]),
        })  # fmt: skip


def read_pairs(path: Path, sides: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Token, pole and count of every row of pairs.parquet."""
    with opened(path, {"latent": "int", "sign": "int", "token": "int", "count": "int"}) as file:
        table = file.read()
    pole = sides * numbers(table["latent"]).astype(np.int64) + (numbers(table["sign"]) < 0)
    return numbers(table["token"]).astype(np.int64), pole, numbers(table["count"]).astype(np.int64)
