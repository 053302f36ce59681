"""Batches of a store, as a training run reads them."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import torch

from shared.config import TrainConfig
from shared.store.opened import Store
from train.data.loader import FixedSnapshot, Loader, StorePass
from train.data.order import StreamPosition, make_order, share, split
from train.data.rows import HookRows, KeptRows
from train.data.stream import BatchStream

HOOK = "layer_01/mlp_out"


def open_stream(
    store: Store,
    config: TrainConfig,
    world: tuple[int, int] = (0, 1),
    at: list[StreamPosition] | None = None,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    paced: bool | None = None,
) -> BatchStream:
    """`world` = (rank, ranks)."""
    keep = split(store.spec, store.tokens(), config).train
    rows = HookRows.of(store, HOOK)
    units = rows.units(config.run_chunks or 1)
    unit_rows = (config.run_chunks or 1) * store.spec.chunk_rows
    order = make_order(len(units), unit_rows, config.streams, config.window_rows, config.seed)
    passes = FixedSnapshot(StorePass(rows, KeptRows(rows, keep), units, unit_rows, order))
    shares = share(config.batch, order.streams, *world)
    loader = Loader(passes, [stream for stream, _, _ in shares], "always", device, paced=paced)
    return BatchStream(loader, shares, config.batch // order.streams, at or [StreamPosition()] * order.streams)


def batches(
    store: Store, config: TrainConfig, count: int, **how: Any
) -> Iterator[tuple[torch.Tensor, dict[int, StreamPosition]]]:
    """Batches with the positions after each."""
    with closing(open_stream(store, config, **how)) as stream:
        for _ in range(count):
            yield stream.next_batch().clone(), stream.positions()
