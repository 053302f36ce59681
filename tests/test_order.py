"""Order: every row once an epoch, from any position, for any number of ranks, and nothing held out is trained on."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.config import TrainConfig
from shared.errors import UserError
from shared.permute import permutation
from shared.shard import as_float32
from shared.store import Store
from train.order import Order, Position, heldout_contexts, make_order, share, split
from train.rows import Kept, Rows
from train.stream import BatchStream, Loader, Pass, Same

HOOK = "layer_01/mlp_out"
Config = Callable[..., TrainConfig]


def test_golden_order() -> None:
    """The order is part of what a checkpoint means: it may change only together with the checkpoint's version."""
    assert permutation(10, 7, 2, 0).tolist() == [7, 3, 2, 0, 8, 4, 9, 5, 1, 6]
    order = Order(n_units=11, streams=2, window_units=3, seed=7)
    assert [[w.tolist() for w in order.windows(1, v)] for v in (0, 1)] == [
        [[3], [6, 9, 8], [1]],
        [[5, 7, 10], [2, 4, 0]],
    ]
    assert order.rows(1, 0, 2, 6).tolist() == [2, 5, 0, 4, 1, 3]


def test_seeds_and_epochs_do_not_collide() -> None:
    orders = {tuple(permutation(50, seed, 2, epoch)) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 200), streams=st.sampled_from([1, 2, 4, 8]), window=st.integers(1, 50), seed=st.integers(0, 9),
    epoch=st.integers(0, 3),
)  # fmt: skip
def test_an_epoch_holds_every_chunk_once(n: int, streams: int, window: int, seed: int, epoch: int) -> None:
    order = make_order(n, 1, streams, window * streams, seed)
    assert order.streams == 1 or n // order.streams >= 16
    assert streams % order.streams == 0
    windows = [w for v in range(order.streams) for w in order.windows(epoch, v)]
    assert sorted(np.concatenate(windows)) == list(range(n))
    assert all(0 < len(w) <= order.window_units for w in windows)


def batches(
    store: Store,
    config: TrainConfig,
    count: int,
    world: tuple[int, int] = (0, 1),
    at: list[Position] | None = None,
) -> Iterator[tuple[torch.Tensor, dict[int, Position]]]:
    """Batches with the positions after each. `world` = (rank, ranks)."""
    keep = split(store.spec, store.tokens(), config).train
    rows = Rows.of(store, HOOK)
    units = rows.units(config.run_chunks or 1)
    unit_rows = (config.run_chunks or 1) * store.spec.chunk_rows
    order = make_order(len(units), unit_rows, config.streams, config.window_rows, config.seed)
    loader = Loader(Same(Pass(rows, Kept(rows, keep), units, order)), order.streams, "always", torch.device("cpu"))
    start = at or [Position()] * order.streams
    stream = BatchStream(loader, share(config.batch, order.streams, *world), config.batch // order.streams, start)
    with closing(stream):
        for _ in range(count):
            yield stream.next_batch().clone(), stream.positions()


def fingerprints(rows: torch.Tensor) -> list[bytes]:
    return [row.numpy().tobytes() for row in rows.view(torch.int16)]


@pytest.mark.parametrize("streams", [1, 4])
def test_an_epoch_gives_every_kept_row_once(store: Store, train_config: Config, streams: int) -> None:
    """With one stream exactly; with several but for what the longer ones have to go when an epoch's rows are out."""
    config = train_config(batch=4, streams=streams)
    keep = split(store.spec, store.tokens(), config).train
    n = int(keep.reshape(-1)[:5000].sum())
    rows = Rows.of(store, HOOK)
    kept = Kept(rows, keep)
    known = Counter(row.tobytes() for unit in rows.units(1) for row in kept.values(unit.shard, unit.first))
    given_out = Counter(row for batch, _ in batches(store, config, n // 4) for row in fingerprints(batch))
    twice, never = (given_out - known).total(), (known - given_out).total()
    assert given_out.total() == n // 4 * 4
    assert set(given_out) <= set(known)
    assert twice == (0 if streams == 1 else pytest.approx(0, abs=0.03 * n))
    assert never <= twice + 3


def test_batches_go_on_from_every_position(store: Store, train_config: Config) -> None:
    """State saved before any of 120 batches (past an epoch's end) gives the same batches again."""
    config = train_config(batch=64, streams=4, window_rows=256)
    whole = list(batches(store, config, 120))
    assert whole[-1][1][0].epoch >= 1
    for cut in (1, 7, 30, 61, 75, 100, 119):
        positions = whole[cut - 1][1]
        again = list(batches(store, config, 120 - cut, at=[positions[v] for v in range(4)]))
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(whole[cut:], again, strict=True)), cut


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_same_global_batches(store: Store, train_config: Config, ranks: int) -> None:
    config = train_config(batch=64, streams=4)
    alone = [batch for batch, _ in batches(store, config, 20)]
    shares = [[b for b, _ in batches(store, config, 20, world=(rank, ranks))] for rank in range(ranks)]
    for step, batch in enumerate(alone):
        assert torch.equal(batch, torch.cat([part[step] for part in shares])), "in the same order, too"


def test_held_out_contexts_are_never_trained_on(store: Store, train_config: Config) -> None:
    parts = split(store.spec, store.tokens(), train_config())
    assert not (parts.train & parts.heldout).any()
    assert not (parts.train.any(1) & parts.heldout.any(1)).any(), "no context is in both"
    assert parts.heldout.any(1).sum() == 320 // store.spec.context
    tokens = store.tokens()
    for mask in (parts.train, parts.heldout):
        assert not mask[:, 0].any()
        assert not (mask & np.isin(tokens, store.spec.special_ids)).any()
    everything = train_config(exclude_positions=(), exclude_special=False)
    parts = split(store.spec, store.tokens(), everything)
    assert (parts.train | parts.heldout).all()


def test_held_out_contexts_are_bounded_and_seeded(store: Store) -> None:
    spec = store.spec
    few, many = heldout_contexts(spec, 1, 0), heldout_contexts(spec, 10**9, 0)
    assert len(few) == 1
    assert len(many) == spec.n_contexts // 10
    assert len(set(many.tolist())) == len(many)
    assert not np.array_equal(many, heldout_contexts(spec, 10**9, 1))
    big = spec.model_copy(update={"n_tokens": 10**7, "shard_rows": 65536, "context": 128})
    shards = heldout_contexts(big, 100_000, 0) * 128 // 65536
    assert len(set(shards.tolist())) <= 8, "evaluation reads a few shards, not the whole store"


def test_a_batch_is_well_mixed(store: Store, train_config: Config) -> None:
    """The mean of a batch varies about as it would under a global shuffle: neighbours are not given out together."""
    config = train_config(batch=64, streams=4, window_rows=2048)
    rows = torch.cat([batch.float() for batch, _ in batches(store, config, 60)])
    means = rows.view(60, 64, -1).mean(1)
    inflation = (means.var(0).sum() / (rows.var(0).sum() / 64)).item()
    assert inflation < 1.5


def test_a_store_without_usable_rows_is_an_error(store: Store, train_config: Config) -> None:
    config = train_config(exclude_positions=tuple(range(16)))
    with pytest.raises(UserError, match="too few activations"):
        next(batches(store, config, 1))


def test_rows_reach_the_batch_unchanged(store: Store, train_config: Config) -> None:
    batch, _ = next(batches(store, train_config(), 1))
    assert batch.dtype == torch.bfloat16
    rows = Rows.of(store, HOOK)
    stored = np.concatenate([as_float32(rows.values(unit.shard, unit.first), "bfloat16") for unit in rows.units(1)])
    known = {row.tobytes() for row in stored}
    assert all(row.numpy().tobytes() in known for row in batch.float())
