"""The tokens that a latent's values are judged by: those that follow its firings, on contexts that are not steered.

T+ are the tokens most enriched right after the latent fired above zero, T- right after it fired below zero:

    log((n_after + prior) / (n_firings · share of the token + prior))

where the share is that of the token among all next tokens. A token of both sets is in neither. A latent that uses one
pole has the most depleted tokens in the other set.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shared.errors import UserError

TOKENS: Final = 8
"""Tokens of a set, at most."""
PRIOR: Final = 2.0
"""Expected occurrences that are added to both counts."""
FEWEST: Final = 3
"""Occurrences after firings that make a token enriched, or expected ones that make it depleted."""

MOST_DRAWN: Final = 1_000_000_000
"""Firings among which numpy draws, at most."""

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class NextTokens:
    """Counts of next tokens: of all rows, and of the rows on which some latents fire."""

    base: Counts
    """[vocab_size] over all rows."""
    keys: Counts
    """[pairs] rising (2 · index of the latent + (1 below zero, else 0)) · vocab_size + token."""
    counts: Counts
    """[pairs]"""

    @classmethod
    def joined(cls, parts: Iterable["NextTokens"], vocab_size: int) -> "NextTokens":
        """Returns the sums of counts."""
        base, keys, counts = np.zeros(vocab_size, np.int64), np.empty(0, np.int64), np.empty(0, np.int64)
        for part in parts:
            base = base + part.base
            every, at = np.unique(np.concatenate([keys, part.keys]), return_inverse=True)
            counts = np.bincount(at, np.concatenate([counts, part.counts]), len(every)).astype(np.int64)
            keys = every
        return cls(base, keys, counts)

    @classmethod
    def counted(cls, f: NDArray[np.float32], after: Counts, vocab_size: int) -> "NextTokens":
        """Counts the next token `after` [rows] of rows with latents `f` [rows, latents]."""
        row, latent = np.nonzero(f)
        pole = 2 * latent + (f[row, latent] < 0)
        keys, counts = np.unique(pole * vocab_size + after[row], return_counts=True)
        return cls(np.bincount(after, minlength=vocab_size), keys.astype(np.int64), counts.astype(np.int64))

    def after(self, index: int, below: bool) -> Counts:
        """[vocab_size] counts after firings of one pole."""
        size = len(self.base)
        first, last = np.searchsorted(self.keys, [(2 * index + below) * size, (2 * index + below + 1) * size])
        found = np.zeros(size, np.int64)
        found[self.keys[first:last] % size] = self.counts[first:last]
        return found


@dataclass(frozen=True)
class TokenSets:
    """T+ and T-."""

    plus: tuple[int, ...]
    minus: tuple[int, ...]

    @property
    def usable(self) -> bool:
        """Whether both have two tokens at least."""
        return min(len(self.plus), len(self.minus)) >= 2


def log_ratio(after: Counts, base: Counts) -> NDArray[np.float64]:
    """[vocab_size] how much more often tokens follow the firings than they follow any row."""
    expected = after.sum() * base / max(1, base.sum())
    found: NDArray[np.float64] = np.log((after + PRIOR) / (expected + PRIOR))
    return found


def enriched(after: Counts, base: Counts) -> list[int]:
    """The most enriched tokens, the most first."""
    ratio = log_ratio(after, base)
    order = np.argsort(-ratio, kind="stable")
    return [int(token) for token in order[(after >= FEWEST)[order] & (ratio[order] > 0)][:TOKENS]]


def depleted(after: Counts, base: Counts) -> list[int]:
    """The most depleted tokens, the most first."""
    ratio, expected = log_ratio(after, base), after.sum() * base / max(1, base.sum())
    order = np.argsort(ratio, kind="stable")
    return [int(token) for token in order[(expected >= FEWEST)[order] & (ratio[order] < 0)][:TOKENS]]


def token_sets(
    above: Counts, below: Counts, base: Counts, special: Sequence[int], poles: tuple[bool, bool]
) -> TokenSets:
    """Returns T+ and T- of a latent from the counts after firings above and below zero. `poles`: whether it uses each
    of the two. `special` tokens are in neither set."""
    above, below, base = (without(counts, special) for counts in (above, below, base))
    plus = enriched(above, base) if poles[0] else depleted(below, base)
    minus = enriched(below, base) if poles[1] else depleted(above, base)
    both = set(plus) & set(minus)
    return TokenSets(*(tuple(token for token in part if token not in both) for part in (plus, minus)))


def without(counts: Counts, tokens: Sequence[int]) -> Counts:
    found = counts.copy()
    found[[token for token in tokens if token < len(found)]] = 0
    return found


def shuffled_sets(
    above: Counts, below: Counts, base: Counts, special: Sequence[int], rng: np.random.Generator
) -> TokenSets:
    """Returns T+ and T- from firings whose signs were drawn again: as many of each pole, dealt to two equal parts. A
    latent with one pole has its firings dealt."""
    fewer = min(int(above.sum()), int(below.sum()))
    both = draw(above, fewer, rng) + draw(below, fewer, rng) if fewer else above + below
    plus = draw(both, int(both.sum()) // 2, rng)
    return token_sets(plus, both - plus, base, special, (True, True))


def draw(counts: Counts, many: int, rng: np.random.Generator) -> Counts:
    """Counts of `many` of the things that were counted, drawn without putting any back."""
    if counts.sum() >= MOST_DRAWN:
        raise UserError(f"a latent fired {counts.sum():,} times, too often to shuffle its signs. Give fewer --tokens")
    found, there = np.zeros_like(counts), np.flatnonzero(counts)
    found[there] = rng.multivariate_hypergeometric(counts[there], many, method="marginals")
    return found
