"""Counts of firings and the geometry of a decoder, on codes and decoders whose answer is known beforehand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from train.measure import directions as geometry
from train.measure.census import DENSITY_EDGES, MINORITY_EDGES, Firings, census, dead, densities, histogram
from train.measure.directions import COSINE_EDGES, directions, extremes


def counted(*codes: Tensor) -> Firings:
    firings = Firings.none(codes[0].shape[1])
    for f in codes:
        firings.add_(f)
    return firings


def code() -> Tensor:
    """100 tokens, five latents: both signs alike with mass 200; 10 of 100 negative (not *more* than a tenth), mass
    100; 11 of 100 negative, mass 300; positive once, mass 8; never."""
    f = torch.zeros(100, 5)
    f[:50, 0], f[50:, 0] = 2.0, -2.0
    f[:, 1] = torch.where(torch.arange(100) < 90, 1.0, -1.0)
    f[:, 2] = torch.where(torch.arange(100) < 89, 3.0, -3.0)
    f[7, 3] = 8.0
    return f


def test_the_census_of_a_constructed_code() -> None:
    found = census(counted(code()[:30], code()[30:]))
    assert found["live"] == 4
    assert found["bipolar"] == 2 / 4, "the first and the third: exactly a tenth is not more than a tenth"
    assert found["bipolar_mass"] == 500 / 608
    minority = dict(zip(MINORITY_EDGES, found["minority"], strict=False))
    assert {edge: n for edge, n in minority.items() if n} == {0.0: 1, 0.1: 2, 0.45: 1}
    assert sum(found["minority"]) == 4
    assert found["bipolar_energy"] == 2 / 4
    assert found["weaker_energy"] == found["minority"], "every firing of a latent has one magnitude"


def test_a_rare_sign_of_small_values_is_no_pole_by_energy() -> None:
    """A fifth of the firings, each a tenth as large as the others: a quarter of a hundredth of the energy."""
    f = torch.ones(100, 1)
    f[:20] = -0.1
    f[20:] *= 3
    found = census(counted(f[:50], f[50:]))
    assert (found["bipolar"], found["bipolar_energy"]) == (1, 0)
    counts = counted(f)
    assert counts.weaker_energy.item() == pytest.approx(20 * 0.01 / (20 * 0.01 + 80 * 9))
    assert counts.positive_energy.item() == pytest.approx(720)


def test_deciles_go_from_the_busiest_to_the_rarest() -> None:
    """20 latents, the i-th fires 20 - i times; only the busiest two use both signs, each half of the time."""
    f = torch.zeros(40, 20)
    for latent in range(20):
        f[: 20 - latent, latent] = 1.0
    f[:10, :2] *= -1
    deciles = census(counted(f))["deciles"]
    assert deciles["firings"] == [pytest.approx((2 * k + 1.5) / 40) for k in reversed(range(10))]
    assert deciles["bipolar"] == [1, *[0] * 9]
    assert deciles["bipolar_mass"] == [1, *[0] * 9]
    assert deciles["mass"] == [pytest.approx((4 * k + 3) / 210) for k in reversed(range(10))]


def test_too_few_live_latents_leave_deciles_empty_and_none_leave_nothing() -> None:
    assert census(counted(code()))["deciles"]["bipolar"] == [1, 0, 1, 0, *[None] * 6]
    nothing = census(counted(torch.zeros(10, 3)))
    assert (nothing["live"], nothing["bipolar"], nothing["bipolar_mass"]) == (0, None, None)


def test_dead_by_three_conventions() -> None:
    f = torch.zeros(200_000, 4)
    f[:, 0] = 1.0
    f[0, 1] = -1.0
    f[:2, 2] = -1.0
    silent = {"fraction": 0.125, "tokens": 1000}
    found = dead(counted(f), silent)
    assert found["never"] == {"fraction": 0.25, "tokens": 200_000}
    assert found["rare"] == {"fraction": 0.5, "tokens": 200_000}, "once in 200,000 is rare, twice is 1e-5 and is not"
    assert found["silent"] == silent
    few = dead(counted(f[:1000]))
    assert few["rare"]["fraction"] == few["never"]["fraction"] == 0.25
    assert few["silent"] is None


def test_densities_by_sign() -> None:
    f = torch.zeros(1000, 3)
    f[:, 0] = 1.0
    f[:20, 1], f[20:50, 1] = 1.0, -1.0
    found = densities(counted(f))
    where = {name: {DENSITY_EDGES[k]: n for k, n in enumerate(found[name]) if n} for name in ("either", "positive")}
    assert where["either"] == {-0.5: 1, -1.5: 1}, "always, and 5 %"
    assert where["positive"] == {-0.5: 1, -2.0: 1}
    assert found["never"] == {"either": 1, "positive": 1, "negative": 2}
    assert len(found["either"]) == len(DENSITY_EDGES) - 1


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31), n=st.integers(1, 40), d_sae=st.integers(1, 25), cut=st.integers(0, 40),
    threshold=st.floats(0, 2.5),
)  # fmt: skip
def test_counts_hold_for_any_code(seed: int, n: int, d_sae: int, cut: int, threshold: float) -> None:
    """In parts or at once; with signs swapped; with latents in another order: the census is the same."""
    f = torch.randn(n, d_sae, generator=torch.Generator().manual_seed(seed))
    f = torch.where(f.abs() > threshold, f, 0.0)
    found = census(counted(f))
    for same in (counted(f[:cut], f[cut:]), counted(-f)):
        assert census(same) == found
    assert sum(found["minority"]) == found["live"] == int((f != 0).any(0).sum())
    shuffled = census(counted(f.flip(1)))
    assert (shuffled["bipolar"], shuffled["minority"]) == (found["bipolar"], found["minority"])
    for part in densities(counted(f))["either"], densities(counted(-f))["either"]:
        assert sum(part) == found["live"]
    assert dead(counted(f))["never"]["fraction"] == pytest.approx(1 - found["live"] / d_sae)


def test_a_histogram_closes_its_ends() -> None:
    values = torch.tensor([-9.0, 0.0, 0.5, 0.999, 1.0, 2.0, 7.0], dtype=torch.float64)
    assert histogram(values, [0.0, 1.0, 2.0]) == [4, 3]
    assert histogram(values[:0], [0.0, 1.0, 2.0]) == [0, 0]


# ---------------------------------------------------------------------------------------------------- directions


def paired(pairs: int, single: int, d_in: int, angle: float = 0.0) -> Tensor:
    """`pairs` of opposite rows (each turned by `angle` from straight), then single rows, all else orthogonal, none of
    unit length."""
    axes = torch.eye(d_in, dtype=torch.float64)
    first, spare = axes[:pairs], axes[pairs + single : 2 * pairs + single]
    second = -(math.cos(angle) * first + math.sin(angle) * spare)
    return torch.cat([2 * first, 3 * second, axes[pairs : pairs + single]]).float()


def test_antipodal_pairs_are_counted_once_each() -> None:
    found = directions(paired(7, 5, 32))
    assert found["latents"] == 19
    assert (found["antipodal_pairs"], found["repeated_pairs"]) == (7, 0)
    assert {COSINE_EDGES[k]: n for k, n in enumerate(found["farthest"]) if n} == {-1.0: 14, 0.0: 5}
    assert sum(found["nearest"]) == 19
    repeated = paired(7, 5, 32).abs()
    assert directions(repeated)["repeated_pairs"] == 7
    assert directions(repeated)["antipodal_pairs"] == 0


@pytest.mark.parametrize(("cosine", "pairs"), [(0.91, 4), (0.89, 0)])
def test_what_is_not_nearly_opposite_is_no_pair(cosine: float, pairs: int) -> None:
    assert directions(paired(4, 2, 20, math.acos(cosine)))["antipodal_pairs"] == pairs


def test_a_latent_is_in_one_pair_only() -> None:
    """Four rows on nearly one line, one against three: a signed latent takes the place of one of them, not of more."""
    rows = [[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [-1.0, 0.2, 0.0], [-1.0, 0.0, 0.2]]
    assert directions(torch.tensor(rows))["antipodal_pairs"] == 1


@pytest.mark.parametrize("n", [0, 1])
def test_nothing_to_compare(n: int) -> None:
    assert directions(torch.ones(n, 4))["antipodal_pairs"] == 0
    assert directions(torch.ones(n, 4))["nearest"] is None


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(2, 30), block=st.integers(1, 200))
def test_blocks_give_what_the_whole_matrix_gives(seed: int, n: int, block: int) -> None:
    W = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    cosines = torch.nn.functional.cosine_similarity(W[:, None].double(), W[None].double(), dim=2)
    off = ~torch.eye(n, dtype=torch.bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "COSINES_AT_A_TIME", block)
        nearest, nearest_at, farthest, farthest_at = extremes(W)
    assert torch.allclose(nearest.double(), cosines.where(off, -2.0).amax(1), atol=1e-5)
    assert torch.allclose(farthest.double(), cosines.where(off, 2.0).amin(1), atol=1e-5)
    rows = torch.arange(n)
    assert torch.allclose(cosines[rows, nearest_at], nearest.double(), atol=1e-5)
    assert torch.allclose(cosines[rows, farthest_at], farthest.double(), atol=1e-5)
