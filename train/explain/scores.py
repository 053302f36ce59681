"""Scores of an explanation: balanced accuracy, its interval, and the lexical rule's on the same windows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from train.explain.windows import AskedWindow

Z: Final = 1.959964
"""The normal quantile of a 95 % interval."""


@dataclass(frozen=True)
class BalancedScore:
    """How often a question was answered rightly."""

    accuracy: float
    """The mean of the shares of right answers among windows that fire and among those that do not."""
    low: float
    high: float
    """The 95 % interval of the accuracy (Wilson, JASA 22, 1927)."""
    rule: float
    """The accuracy of the pole's lexical rule on the same windows."""
    windows: int


def score(tests: Sequence[AskedWindow], answers: Sequence[bool], rule: Sequence[float]) -> BalancedScore | None:
    """Compares answers with the truth. `rule`: for each window the chance with which the lexical rule says yes. None
    without windows of both kinds."""
    truth = [each.fires for each in tests]
    n_yes, n_no = sum(truth), len(truth) - sum(truth)
    if not n_yes or not n_no:
        return None
    accuracy = balanced(truth, [float(answer) for answer in answers])
    low, high = wilson(accuracy, 4 / (1 / n_yes + 1 / n_no))
    return BalancedScore(accuracy, low, high, balanced(truth, rule), len(truth))


def balanced(truth: Sequence[bool], says: Sequence[float]) -> float:
    right = [(fires, share if fires else 1 - share) for fires, share in zip(truth, says, strict=True)]
    return sum(sum(hit for fires, hit in right if fires is kind) / truth.count(kind) for kind in (True, False)) / 2


def wilson(share: float, n: float) -> tuple[float, float]:
    """The interval of a share of n trials. For a balanced accuracy n is the harmonic mean of the two numbers, times
    two: with it, the variance is that of one share."""
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def rule_detects(rule: Sequence[int], tests: Sequence[AskedWindow]) -> list[float]:
    """The rule says that a pole fires in a window that holds one of its tokens."""
    known = set(rule)
    return [float(not known.isdisjoint(each.window.tokens)) for each in tests]


def rule_at_mark(rule: Sequence[int], tests: Sequence[AskedWindow]) -> list[float]:
    """The rule says that a pole fires at a mark on one of its tokens."""
    known = set(rule)
    return [float(each.window.tokens[each.window.peak] in known) for each in tests]


def rule_tells_poles(above: Sequence[int], below: Sequence[int], tests: Sequence[AskedWindow]) -> list[float]:
    """The rules choose the pole whose tokens hold the marked one; a coin where both do, or neither."""
    up, down = rule_at_mark(above, tests), rule_at_mark(below, tests)
    return [0.5 + (one - other) / 2 for one, other in zip(up, down, strict=True)]
