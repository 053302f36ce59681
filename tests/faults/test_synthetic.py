"""Parameters of synthetic rows that no arithmetic can carry."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import UserError
from shared.schema import build
from shared.synthetic import Synthetic, TrueFeatures


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"noise": 1e300}, "noise"),
        ({"coefficients": [1e200, 1e200]}, "coefficients"),
        ({"coefficients": [1.0, 1.0], "features": 1, "l0": 1.0, "p_bipolar": 0.0, "noise": 1e-200}, "noise"),
        ({"l0": 1e-300}, "l0"),
        ({"features": 1 << 20, "d_in": 1 << 16}, "features"),
        ({"zipf": 1e308}, "zipf"),
    ],
)
def test_a_number_that_arithmetic_cannot_carry_is_refused_by_name(values: dict[str, Any], named: str) -> None:
    """Was: an OverflowError, rows of NaN, or half a terabyte of memory."""
    with pytest.raises(UserError, match=named):
        build(Synthetic, values)


numbers = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([0.0, 1e-300, 1e-9, 1.0, 3.0, 1e6, 1e300, -1.0])
)


@settings(max_examples=200, deadline=None)
@given(numbers, numbers, numbers, numbers, numbers, st.integers(1, 40), st.integers(1, 8))
def test_rows_are_finite_or_refused(
    noise: float, low: float, high: float, l0: float, zipf: float, features: int, d_in: int
) -> None:
    values = {"noise": noise, "coefficients": (low, high), "l0": l0, "zipf": zipf, "features": features, "d_in": d_in}
    try:
        truth = TrueFeatures(build(Synthetic, values))
    except UserError:
        return
    assert np.isfinite(truth.block_rows(0)).all()
