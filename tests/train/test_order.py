"""Order: every row once an epoch, from any position, for any number of ranks, and nothing held out is trained on."""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.batches import HOOK, batches, open_stream
from support.processes import until

from harvest.recode import recode
from shared.config import TrainConfig
from shared.errors import UserError
from shared.permute import permutation
from shared.store.opened import Store
from shared.store.shard import as_float32
from train.data import loader as loading
from train.data.loader import FixedSnapshot, Loader, StorePass, Window, decoding_threads
from train.data.order import ReadOrder, StreamPosition, heldout_contexts, make_order, split
from train.data.read_ahead import SPARE, ReadAhead
from train.data.rows import HookRows, KeptRows
from train.data.stream import VirtualStream

Config = Callable[..., TrainConfig]


def test_golden_order() -> None:
    """The order is part of what a checkpoint means: it may change only together with the checkpoint's version."""
    assert permutation(10, 7, 2, 0).tolist() == [7, 3, 2, 0, 8, 4, 9, 5, 1, 6]
    order = ReadOrder(n_units=11, streams=2, window_units=3, seed=7)
    assert [[w.tolist() for w in order.windows(1, v)] for v in (0, 1)] == [
        [[3], [6, 9], [8, 1]],
        [[5, 7, 10], [2, 4, 0]],
    ]
    assert order.places(1, 6, 6).tolist() == [0, 3, 4, 2, 1, 5]
    assert order.places(1, 4, 6).tolist() == [0, 3, 2, 1], "a smaller window leaves out what it has not"
    assert replace(order, block_rows=2).places(1, 5, 5).tolist() == [0, 1, 4, 2, 3]


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
    assert max(len(w) for w in windows) <= order.longest <= order.window_units
    for stream in range(order.streams if order.longest > 2 * order.streams else 0):
        first, *between = [len(w) for w in order.windows(epoch, stream)][: order.windows_full]
        whole = n / order.streams / order.windows_full
        assert first == pytest.approx(whole * (stream + 1) / order.streams, abs=2), "refilled in turn"
        assert between == [pytest.approx(whole, abs=2)] * len(between)


def fingerprints(rows: torch.Tensor) -> list[bytes]:
    return [row.numpy().tobytes() for row in rows.view(torch.int16)]


@pytest.mark.parametrize("streams", [1, 4])
def test_an_epoch_gives_every_kept_row_once(store: Store, train_config: Config, streams: int) -> None:
    """With one stream exactly; with several but for what the longer ones have to go when an epoch's rows are out."""
    config = train_config(batch=4, streams=streams)
    keep = split(store.spec, store.tokens(), config).train
    assert isinstance(keep, np.ndarray)
    n = int(keep.reshape(-1)[:5000].sum())
    rows = HookRows.of(store, HOOK)
    kept = KeptRows(rows, keep)
    known = Counter(row.tobytes() for unit in rows.units(1) for row in kept.values(unit.shard, unit.first))
    given_out = Counter(row for batch, _ in batches(store, config, n // 4) for row in fingerprints(batch))
    twice, never = (given_out - known).total(), (known - given_out).total()
    assert given_out.total() == n // 4 * 4
    assert set(given_out) <= set(known)
    assert twice == (0 if streams == 1 else pytest.approx(0, abs=0.03 * n))
    assert never <= twice + 3


def positions_after(batch: tuple[torch.Tensor, dict[int, StreamPosition]]) -> list[StreamPosition]:
    return [batch[1][stream] for stream in sorted(batch[1])]


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("run_chunks", "paced"), [(1, False), (3, False), (1, True)])
def test_batches_resume_from_every_position(
    store: Store, train_config: Config, run_chunks: int, paced: bool, every: int
) -> None:
    """State saved before any of the batches of one and a half epochs gives the same batches to the end."""
    config = train_config(batch=96, streams=4, window_rows=256, run_chunks=run_chunks)
    whole = list(batches(store, config, 66))
    epochs = [min(at.epoch for at in batch[1].values()) for batch in whole]
    assert epochs[0] == 0
    assert epochs[-1] == 1
    for cut in range(0, 66, every):
        at = positions_after(whole[cut - 1]) if cut else None
        again = batches(store, config, 66 - cut, at=at, paced=paced)
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(whole[cut:], again, strict=True)), cut


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 8), (8, 2), (2, 1)])
def test_batches_go_on_with_another_number_of_ranks(
    store: Store, train_config: Config, before: int, after: int
) -> None:
    config = train_config(batch=96, streams=4, window_rows=256)
    whole = [batch for batch, _ in batches(store, config, 66)]
    for cut in range(1, 66, 11):
        parts = [list(batches(store, config, cut, world=(rank, before))) for rank in range(before)]
        at = {stream: position for part in parts for stream, position in part[-1][1].items()}
        positions = [at[stream] for stream in range(4)]
        again = [[b for b, _ in batches(store, config, 6, world=(rank, after), at=positions)] for rank in range(after)]
        for step, batch in enumerate(whole[cut : cut + 6]):
            assert torch.equal(batch, torch.cat([part[step] for part in again])), cut


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_who_reads_what(store: Store, train_config: Config, ranks: int) -> None:
    """Whatever the number of ranks: shares of equal length that make up the same global batches in the same order.
    Three and eight ranks do not divide four streams."""
    config = train_config(batch=96, streams=4, window_rows=256)
    alone = [batch for batch, _ in batches(store, config, 66)]
    shares = [[b for b, _ in batches(store, config, 66, world=(rank, ranks))] for rank in range(ranks)]
    assert {len(batch) for part in shares for batch in part} == {96 // ranks}
    for step, batch in enumerate(alone):
        assert torch.equal(batch, torch.cat([part[step] for part in shares]))


def test_what_every_world_reads_is_the_whole_epoch(store: Store, train_config: Config) -> None:
    """All that the streams give out before their second epoch: every kept row, each exactly once."""
    config = train_config(streams=4, window_rows=256)
    rows, keep = HookRows.of(store, HOOK), split(store.spec, store.tokens(), config).train
    units, kept = rows.units(1), KeptRows(rows, keep)
    order = make_order(len(units), store.spec.chunk_rows, 4, 256, config.seed)
    loader = Loader(
        FixedSnapshot(StorePass(rows, kept, units, store.spec.chunk_rows, order)),
        range(4),
        "always",
        torch.device("cpu"),
    )
    given_out: Counter[bytes] = Counter()
    for number in range(4):
        stream = VirtualStream(loader, number, StreamPosition())
        while True:
            window = stream.current_window(lambda future: future.result())
            assert window is not None
            assert loader.memory is not None
            if stream.at.epoch:
                break
            out = loader.memory.batch(window.rows)
            loader.memory.gather(window.order, loader.unit_rows, out)
            given_out.update(fingerprints(out))
            stream.advance(window.rows)
            stream.read_ahead()
    loader.close()
    assert given_out == Counter(r.tobytes() for unit in units for r in kept.values(unit.shard, unit.first))


class StandIn:
    """A stream or an event of a device that does everything at once."""

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *_args: None


@pytest.mark.parametrize("codec", ["zstd", "int8"])
def test_the_way_over_a_device(
    store: Store, train_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    """Through the staging buffers and the device's memory, with a stand-in for CUDA: which window goes where, not
    when. tests/gpu/test_gpu.py has the real thing."""
    if codec == "int8":
        store = Store.open(recode(str(store.root), str(tmp_path / "int8"), "int8").store)
    config = train_config(batch=64, streams=4, window_rows=256)
    direct = [batch for batch, _ in batches(store, config, 150)]
    assert direct[0].dtype == (torch.bfloat16 if codec == "zstd" else torch.float32)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: StandIn())
    monkeypatch.setattr(torch.cuda, "Event", StandIn)
    start = Loader.__init__

    def with_copies(loader: Loader, passes: Any, streams: Any, verify: Any, device: Any, paced: bool | None) -> None:
        start(loader, passes, streams, verify, device, paced=True if paced is None else paced)
        loader.copies = StandIn()  # type: ignore[assignment]

    monkeypatch.setattr(Loader, "__init__", with_copies)
    over = [batch for batch, _ in batches(store, config, 150)]
    assert all(torch.equal(one, other) for one, other in zip(direct, over, strict=True))


def masks(store: Store, config: TrainConfig) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """What is trained on and what is held out, [contexts, context] each."""
    parts = split(store.spec, store.tokens(), config)
    assert isinstance(parts.train, np.ndarray)
    assert isinstance(parts.heldout, np.ndarray)
    return parts.train, parts.heldout


def test_held_out_contexts_are_never_trained_on(store: Store, train_config: Config) -> None:
    train, heldout = masks(store, train_config())
    assert not (train & heldout).any()
    assert not (train.any(1) & heldout.any(1)).any(), "no context is in both"
    assert heldout.any(1).sum() == 320 // store.spec.context
    tokens = store.tokens()
    for mask in (train, heldout):
        assert not mask[:, 0].any()
        assert not (mask & np.isin(tokens, store.spec.special_ids)).any()
    everything = train_config(exclude_positions=(), exclude_special=False)
    train, heldout = masks(store, everything)
    assert (train | heldout).all()


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
    rows = HookRows.of(store, HOOK)
    stored = np.concatenate([as_float32(rows.values(unit.shard, unit.first), "bfloat16") for unit in rows.units(1)])
    known = {row.tobytes() for row in stored}
    assert all(row.numpy().tobytes() in known for row in batch.float())


@pytest.mark.parametrize("ranks", [1, 3])
def test_reading_keeps_pace_with_training(
    store: Store, train_config: Config, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    """Left alone after each batch, the loader reads until it is as far ahead as it may be, or all is read."""
    config, reading = train_config(batch=24, streams=4, window_rows=2048), [0]
    wait_for_rows, add = ReadAhead.wait_for_rows, ReadAhead.add

    def begun(pace: ReadAhead, rows: int, wanted: int) -> int:
        reading[0] = rows
        return wait_for_rows(pace, rows, wanted)

    def complete(pace: ReadAhead, rows: int) -> None:
        reading[0] = 0
        add(pace, rows)

    monkeypatch.setattr(ReadAhead, "wait_for_rows", begun)
    monkeypatch.setattr(ReadAhead, "add", complete)
    monkeypatch.setattr(loading, "decoding_threads", lambda *_: 2)
    with closing(open_stream(store, config, (0, ranks), paced=True)) as stream:
        pace, unit, all_read = stream.loader.pace, store.spec.chunk_rows, 0
        most = (1 + SPARE) * len(stream.shares) * stream.loader.passes.get(0).order.longest * unit
        for _ in range(250):
            stream.next_batch()
            assert not pace.lifted
            patience = time.monotonic() + 10
            while not (done := all(s.following and s.following.done() for s in stream.streams.values())):
                if pace.rows + reading[0] >= most:
                    break
                assert time.monotonic() < patience, "neither read nor waiting"
                time.sleep(0.001)
            all_read += done
            assert pace.rows + reading[0] < most + unit
    assert 0 < all_read < 175, "the next windows are read as the last are used up"


@pytest.mark.parametrize("begin", [0, 40])
def test_windows_are_needed_where_the_ones_before_end(
    store: Store, train_config: Config, monkeypatch: pytest.MonkeyPatch, begin: int
) -> None:
    """So many rows has a stream given out when it enters one: who reads first is decided by that."""
    config, asked = train_config(batch=32, streams=4, window_rows=256), {}
    load = Loader.load

    def noted(loader: Loader, stream: int, epoch: int, window: int, turn: int, needed: int) -> Window:
        asked[stream, epoch, window] = needed
        return load(loader, stream, epoch, window, turn, needed)

    at = [StreamPosition()] * 4
    if begin:
        *_, last = batches(store, config, begin)
        at = positions_after(last)
    monkeypatch.setattr(Loader, "load", noted)
    seen = set()
    for number, (_, positions) in enumerate(batches(store, config, 150, at=at)):
        for stream, now in positions.items():
            window, first = (stream, now.epoch, now.window), (at[stream].epoch, at[stream].window)
            if now.offset:
                began = at[stream].offset if (now.epoch, now.window) == first else 0
                assert asked[window] == 8 * (number + 1) - (now.offset - began)
                seen.add(window)
    assert len(seen) > 20


def test_closing_ends_reading_with_the_chunks_that_are_being_read(
    store: Store, train_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with their window, nor with those of other streams."""
    begun, go_on, read = [], threading.Event(), loading.read_unit

    def held(*arguments: Any) -> None:
        begun.append(arguments)
        go_on.wait(20)
        read(*arguments)

    monkeypatch.setattr(loading, "read_unit", held)
    monkeypatch.setattr(loading, "decoding_threads", lambda *_: 2)
    stream = open_stream(store, train_config(batch=24, streams=4, window_rows=2048), at=[StreamPosition(0, 1)] * 4)
    assert len(stream.loader.passes.get(0).order.windows(0, 0)[1]) > 2
    until(lambda: len(begun) == 2)
    closed = threading.Thread(target=stream.close)
    closed.start()
    until(lambda: stream.loader.pace.closed)
    go_on.set()
    closed.join()
    assert len(begun) == 2


def test_who_waits_for_a_window_has_it_read(store: Store, train_config: Config) -> None:
    """However little ahead reading may be: batches come, and closing does not wait for training."""
    config = train_config(batch=96, streams=4, window_rows=256)
    direct = [batch for batch, _ in batches(store, config, 66)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReadAhead, "limit", lambda pace, _rows: setattr(pace, "limit_rows", 0))
        paced = [batch for batch, _ in batches(store, config, 66, paced=True)]
    assert all(torch.equal(one, other) for one, other in zip(direct, paced, strict=True))


@pytest.mark.parametrize(("cores", "paced"), [(1, 1), (2, 1), (4, 3), (8, 7), (16, 8), (32, 16)])
def test_threads_that_decode(cores: int, paced: int) -> None:
    assert decoding_threads(cores, paced=False) == cores
    assert decoding_threads(cores, paced=True) == paced


def test_processes_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    nothing: Any = SimpleNamespace(open=bool, get=bool, close=bool)
    for processes, cores in ((1, 12), (3, 4), (24, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        with closing(Loader(nothing, range(4), "off", torch.device("cpu"))) as loader:
            assert loader.threads == cores
