"""What `store info` says of norms and dimensions equals what numpy says of all rows at once."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.stores import in_token_order

from harvest.run import harvest as run_harvest
from shared.config import HarvestConfig
from shared.store.norms import QUANTILES, norms, outlying
from shared.store.opened import Statistics, Store
from shared.store.shard import as_float32
from shared.store.spec import rows_that_count


@pytest.mark.parametrize("changes", [{}, {"skip_positions": 0, "hooks": ("resid_post",)}])
def test_norms_are_exact(harvest_config: Callable[..., HarvestConfig], tmp_path: Path, changes: dict[str, int]) -> None:
    store = Store.open(run_harvest(harvest_config(tmp_path, **changes)).store)
    hook = "layer_01/resid_post"
    x = as_float32(in_token_order(store, hook), "bfloat16").astype(np.float64)
    lengths = np.linalg.norm(x, axis=1).astype(np.float32)
    kept = rows_that_count(store.tokens(), store.spec).reshape(-1)[: len(x)]
    found = norms(store, hook)
    assert found is not None
    assert found.n == kept.sum()
    assert found.mean == pytest.approx(lengths[kept].mean(dtype=np.float64), rel=1e-12)
    assert found.at_position_0 == pytest.approx(lengths[::16].mean(dtype=np.float64), rel=1e-12)
    ordered = np.sort(lengths[kept])
    assert found.quantiles == {q: float(ordered[int(q * (len(ordered) - 1))]) for q in QUANTILES}
    assert found.nonfinite == 0


def test_outlying_dimensions() -> None:
    mean, variance = np.zeros(9), np.ones(9)
    even = Statistics(10, mean, variance)
    assert outlying(even) == {}
    mean[3], variance[7] = -7.0, 400.0
    assert outlying(replace(even, mean=mean, variance=variance)) == {7: 20.0, 3: 7.07}


def test_a_store_in_which_nothing_counts(store: Store) -> None:
    assert norms(store.only([]), "layer_01/mlp_out") is None
