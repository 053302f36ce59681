"""The arithmetic of the dial test on numbers whose answer is known."""

from collections import Counter

import numpy as np
import pytest
import torch

from train.data.row_mask import RowMask
from train.steer.contrast import NextTokens, depleted, enriched, shuffled_sets, token_sets
from train.steer.controls import at_size, control_sizes, discoveries, draw_controls, p_value
from train.steer.follow import first_contexts


def test_p_is_the_share_of_controls_of_either_sign() -> None:
    controls = np.array([0.1, -0.2, 0.3, 0.05])
    assert p_value(0.5, controls) == 1 / 9
    assert p_value(0.25, controls) == 2 / 9
    assert p_value(0.2, controls) == 3 / 9, "as large counts"
    assert p_value(-0.5, controls) == 1.0
    assert p_value(0.0, controls) == pytest.approx(5 / 9)
    assert p_value(1.0, np.empty(0)) is None


def test_p_is_never_too_small_for_a_direction_like_the_controls() -> None:
    """Under the null at most a share a of p is a or less, for every a: 20,000 draws of 41 slopes."""
    slopes = np.random.default_rng(0).standard_normal((20_000, 41)) ** 3
    found = np.array([p_value(float(row[0]), row[1:]) for row in slopes])
    for level in (0.0124, 0.05, 0.1, 0.3):
        assert (found <= level).mean() <= level + 0.004
    assert (found <= 0.05).mean() > 0.04


def test_benjamini_and_hochberg() -> None:
    p = [0.04, 0.001, 0.2, 0.019, 0.9]
    assert discoveries(p, 0.1) == [True, True, False, True, False], "0.04 <= 0.1 · 3 / 5"
    assert discoveries(p, 0.05) == [False, True, False, True, False]
    assert discoveries([0.03, 0.03], 0.03) == [True, True]
    assert discoveries([0.5], 0.1) == [False]
    assert discoveries([], 0.1) == []


def test_enriched_and_depleted_tokens() -> None:
    base = np.full(20, 1000)
    after = np.full(20, 50)
    after[[3, 7]], after[[5]], after[11] = [200, 120], 0, 2
    assert enriched(after, base)[:2] == [3, 7]
    assert depleted(after, base)[:2] == [5, 11]
    rare = np.zeros(20, np.int64)
    rare[4] = 2
    assert enriched(rare, base) == [], "fewer than 3 occurrences show nothing"
    below = np.full(20, 50)
    below[[7, 9]] = 300
    sets = token_sets(after, below, base, (9,), (True, True))
    assert 3 in sets.plus
    assert 7 not in (*sets.plus, *sets.minus), "in neither where it is in both"
    assert 9 not in sets.minus, "special"
    assert token_sets(after, below * 0, base, (), (True, False)).minus[:2] == (5, 11)


def test_shuffled_signs_have_equal_numbers_of_both_poles() -> None:
    """1,000 firings above zero are followed by tokens 0 to 4, 200 below by 5 to 9: no half has more of either."""
    above, below = np.zeros(10, np.int64), np.zeros(10, np.int64)
    above[:5], below[5:] = 200, 40
    base = np.full(10, 10_000)
    rng = np.random.default_rng(0)
    sides = Counter(
        (token < 5, name)
        for _ in range(400)
        for name in ("plus", "minus")
        for token in getattr(shuffled_sets(above, below, base, (), rng), name)
    )
    for low in (True, False):
        assert sides[low, "plus"] == pytest.approx(sides[low, "minus"], rel=0.15)
        assert sides[low, "plus"] > 300


def test_next_tokens_are_counted_by_pole() -> None:
    f = np.array([[1.0, 0.0], [-2.0, 3.0], [0.5, 0.0], [0.0, -1.0]], np.float32)
    one = NextTokens.counted(f, np.array([4, 4, 2, 0]), 6)
    both = NextTokens.joined([one, one, NextTokens.counted(f[:1], np.array([1]), 6)], 6)
    assert both.base.tolist() == [2, 1, 2, 0, 4, 0]
    assert both.after(0, False).tolist() == [0, 1, 2, 0, 2, 0]
    assert both.after(0, True).tolist() == [0, 0, 0, 0, 2, 0]
    assert both.after(1, False).tolist() == [0, 0, 0, 0, 2, 0]
    assert both.after(1, True).tolist() == [2, 0, 0, 0, 0, 0]


def test_control_directions_are_unit_vectors_of_two_kinds() -> None:
    W_dec = 3 * torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    controls, rows = draw_controls(W_dec, np.arange(4, 12), 40, np.random.default_rng(0))
    assert torch.allclose(rows.norm(dim=1), torch.ones(40))
    others = [control.latent for control in controls if control.kind == "other"]
    assert sorted(filter(None, others)) == list(range(4, 12)), "each once; the rest are random"
    assert len(others) == 8
    for control, row in zip(controls, rows, strict=True):
        if control.latent is not None:
            assert torch.allclose(row, control.sign * W_dec[control.latent] / W_dec[control.latent].norm())
    assert draw_controls(W_dec, np.arange(4, 12), 0, np.random.default_rng(0))[1].shape == (0, 8)


def test_sizes_span_those_of_the_latents() -> None:
    assert control_sizes([2.0, 1.0, 4.0]) == [1.0, 2.0, 4.0]
    assert control_sizes([2.0]) == control_sizes([2.0, 2.001]) == [2.0]
    slopes = np.array([[1.0, -2.0], [2.0, -4.0], [3.0, -8.0]])
    assert at_size(slopes, [1.0, 2.0, 4.0], 3.0).tolist() == [2.5, -6.0]
    assert at_size(slopes[:1], [1.0], 1.005).tolist() == [1.0, -2.0]


@pytest.mark.parametrize("contexts", [0, 1, 3, 5, 7])
def test_a_mask_of_the_first_contexts(contexts: int) -> None:
    marks = np.ones((7, 5), bool)
    found = first_contexts(RowMask.of(marks), contexts)
    assert found.places().tolist() == list(range(5 * contexts))
