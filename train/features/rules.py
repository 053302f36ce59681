"""The lexical rule of a pole: the few tokens that best tell whether it fires.

It is a label that needs no language model, and the baseline that a written explanation has to beat.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from train.features.pairs import PairRun
from train.features.slots import counted_off, foremost, strength

TOKENS: Final = 8
"""Tokens of a rule, at most."""
FEWEST: Final = 3
"""Firings on a token that make it a candidate."""
ROUNDS: Final = 30


@dataclass(frozen=True)
class LexicalRules:
    """The rules of some poles."""

    pole: NDArray[np.int64]
    token: NDArray[np.int64]
    """[entries], by pole; the token that tells most comes first."""
    f1: NDArray[np.float64]
    """[poles]: the harmonic mean of precision and recall of "it fires on these tokens"; 0 without a rule."""


def lexical_rules(run: PairRun, first: int, firings: NDArray[np.int64], read: NDArray[np.int64]) -> LexicalRules:
    """Finds the rule of largest F1 for each pole. `run`: counts of (pole, token) for poles from `first` on; `firings`:
    of each of these poles; `read`: the rows with each token, by token id.

    F1 of a set S is 2 Σk / (n + Σc): k firings on the token, c rows with it, n firings. It is maximised exactly, by
    Dinkelbach's method (Management Science 13, 1967): the best S for a level λ holds the tokens of largest 2k - λc,
    and its F1 is the next level."""
    keep = run.counts >= FEWEST
    pole, token, count = run.poles[keep] - first, run.tokens[keep], run.counts[keep].astype(np.float64)
    rows, n = read[token].astype(np.float64), np.maximum(firings, 1).astype(np.float64)
    level = np.zeros(len(firings))
    np.maximum.at(level, pole, 2 * count / (n[pole] + rows))
    chosen = np.empty(0, np.int64)
    for _ in range(ROUNDS):
        gain = 2 * count - level[pole] * rows
        useful = gain > 0  # and never again for a larger level
        pole, token = pole[useful], token[useful]
        count, rows, gain = count[useful], rows[useful], gain[useful]
        some = foremost(pole, strength(pole, gain.astype(np.float32), token), TOKENS)
        order = some[np.lexsort((token[some], -gain[some], pole[some]))]
        chosen = order[counted_off(pole[order]) < TOKENS]
        hits = np.bincount(pole[chosen], count[chosen], len(firings))
        said = np.bincount(pole[chosen], rows[chosen], len(firings))
        reached = np.maximum(level, 2 * hits / (n + said))
        if (reached <= level).all():
            break
        level = reached
    return LexicalRules(pole[chosen] + first, token[chosen], level)
