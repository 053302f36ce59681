"""The sums that `store verify --full` compares with a store's moments, against numpy in float64."""

import numpy as np
import pytest

from shared.store.recount import row_sums


@pytest.mark.parametrize("lost", [(), (0, 300), tuple(range(700))])
def test_sums_leave_out_rows_that_do_not_count_and_find_lost_ones(lost: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(1, 3, (700, 48)).astype("f4")
    x[list(lost), 5] = np.resize(np.array([np.nan, np.inf, -np.inf], "f4"), len(lost))
    counted = rng.random(700) < 0.8
    counted[list(lost)] = False
    expected = np.where(counted[:, None], x, 0).astype("f8")
    found = row_sums((part.copy() for part in np.split(x, [500])), counted)
    np.testing.assert_allclose(found.total, expected.sum(0), rtol=1e-6)
    np.testing.assert_allclose(found.squares, np.square(expected).sum(0), rtol=1e-6)
    assert np.flatnonzero(~np.isfinite(found.norms)).tolist() == list(lost)
    kept = np.isfinite(found.norms)
    np.testing.assert_allclose(found.norms[kept], np.linalg.norm(x[kept].astype("f8"), axis=1), rtol=1e-6)
