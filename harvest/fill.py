"""The main loop of a harvest: one shard is captured while the previous one is written."""

import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from harvest.capture import Capture, Slot, make_slot
from harvest.disk_space import check_progress
from harvest.ring import Ring
from harvest.team import Team
from harvest.writer import Ready, ShardWriter
from shared.config import HarvestConfig
from shared.device import reuse_memory
from shared.errors import UserError
from shared.memory import host_memory
from shared.model.language_model import side_by_side
from shared.model.source import ModelSource
from shared.progress import progress, say
from shared.store.opened import Store
from shared.store.spec import DTYPES, StoreSpec
from shared.store.tokens import CountedMask

SLOTS = 3
"""Shards in memory: one being captured, one being written, one waiting in between."""
CPU_BATCH = 2_048
"""Tokens per batch on a CPU."""
MAX_STREAMS = 16
"""Largest number of batches side by side. Each needs its own wrapper around the model, which takes a moment to make;
further cores share the batches."""


@dataclass(frozen=True)
class FillResult:
    """The timing of a fill."""

    started: float
    """Time on the monotonic clock at which the model was loaded and the first batch began."""
    waited: float
    """Seconds in which the model waited for the writer."""


def fill(
    store: Store,
    config: HarvestConfig,
    source: ModelSource,
    team: Team,
    check_stop: Callable[[], None],
    todo: list[int],
    loaded: Any = None,
) -> FillResult:
    """Captures and commits the shards `todo`. `check_stop` is called between batches and may raise. `loaded` is what
    `load_weights` returned, if the weights are in memory already."""
    spec = store.spec
    check_stop()
    device = team.device(config.device)
    n_models = stream_count(device, spec, config, team.threads)
    models = side_by_side(source, device, spec.model["dtype"], spec.model["attention"], n_models, loaded)
    model = models[0]
    check_stop()
    model.check_hooks([hook.name for hook in spec.hookpoints.values()])
    tokens = store.token_rows(check=team.rank == 0)  # ranks 1 and up check only what their own shards read
    keep = CountedMask(tokens)
    reuse_memory(model.device)
    batch = config.batch_tokens or default_batch_tokens(model.device, model.d_model)
    ring: Ring[Slot] = Ring(partial(make_slot, spec, model.device), SLOTS, partial(finish_work, model.device))
    nonfinite = config.allow_nonfinite
    with (
        closing(Capture(models, spec, tokens, keep, max(1, batch // spec.context), team.threads)) as capture,
        closing(
            ShardWriter(store.files, spec, keep, writer=team.rank, threads=team.threads, allow_nonfinite=nonfinite)
        ) as writer,
        progress(f"harvest {store.name}", rows_of(spec, todo), "tokens", shown=team.rank == 0) as advance,
    ):
        watch = HarvestWatch(store, config, team, writer, ring, check_stop, advance)
        for shard in todo:
            slot = ring.take(watch.check)
            rows = capture_shard(capture, shard, slot, watch)
            writer.submit(shard, rows, partial(ring.give_back, slot))
        capture.finish(watch.after_batch)
        writer.wait()
    return FillResult(watch.started, ring.waited)


def stream_count(device: str, spec: StoreSpec, config: HarvestConfig, cores: int) -> int:
    """The number of batches computed side by side. On a CPU it is one per core, or as many as fit into a quarter of the
    free memory, at about 40 float32 numbers of the widest row per token. Elsewhere it is 1."""
    if not device.startswith("cpu"):
        return 1
    tokens = max(spec.context, config.batch_tokens or CPU_BATCH)
    each, free = 160 * tokens * max(hook.d_in for hook in spec.hookpoints.values()), host_memory()
    return max(1, min(cores, MAX_STREAMS, cores if free is None else free // 4 // each))


def finish_work(device: torch.device) -> None:
    """Waits until the device has finished the model's queued work."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def capture_shard(capture: Capture, shard: int, slot: Slot, watch: "HarvestWatch") -> Ready:
    """Captures one shard. When a GPU runs out of memory, this shard is captured again and this and all later batches
    are halved. Raises UserError when one context does not fit."""
    while True:
        before = watch.rows
        try:
            return capture.shard(shard, slot, watch.after_batch)
        except torch.OutOfMemoryError as error:
            watch.after_batch(before - watch.rows)
            if capture.batch == 1:
                raise no_memory(capture.model.device, capture.spec.context) from error
        capture.batch = -(-capture.batch // 2)
        say(f"out of memory: continuing with {capture.batch * capture.spec.context:,} tokens per batch")
        forget_batch(capture.model.device)


def forget_batch(device: torch.device) -> None:
    """Frees CUDA memory after a batch that ran out of it. Nothing refers to the batch by then."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def no_memory(device: torch.device, context: int) -> UserError:
    return UserError(
        f"--device {device}: its memory is too small for one context of {context} tokens. Lower --context, or use a "
        "larger GPU"
    )


class HarvestWatch:
    """Checks between batches: stop requests, failed commits, progress, disk space."""

    def __init__(
        self,
        store: Store,
        config: HarvestConfig,
        team: Team,
        writer: ShardWriter,
        ring: Ring[Slot],
        check_stop: Callable[[], None],
        advance: Callable[[int, str], None],
    ) -> None:
        self.store, self.config, self.team, self.writer, self.ring = store, config, team, writer, ring
        self.check_stop, self.advance = check_stop, advance
        spec = store.spec
        self.row_bytes = sum(hook.d_in for hook in spec.hookpoints.values()) * DTYPES[spec.dtype][0].itemsize
        self.started = time.monotonic()
        self.rows = 0
        self.measured = False

    def check(self) -> None:
        """Raises the reason to stop: a signal, a failed commit, or a disk that turns out to be too small."""
        self.check_stop()
        self.writer.check()
        if self.writer.commits and not self.measured:
            self.measured = True
            message = check_progress(self.store, self.writer.commits, self.config.out)
            if self.team.rank == 0:
                say(f"measured on the first shard: {message}")

    def after_batch(self, rows: int) -> None:
        self.rows += rows
        seconds = time.monotonic() - self.started
        rate = self.rows / seconds
        together = f" in each of {self.team.size} processes" if self.team.size > 1 else ""
        self.advance(
            rows,
            f"{rate:,.0f} tokens/s, {rate * self.row_bytes / 1e9:.2f} GB/s{together}, waiting for the writer "
            f"{self.ring.waited / seconds:.0%}",
        )
        self.check()


def default_batch_tokens(device: torch.device, d_model: int) -> int:
    """The default number of tokens per batch. On a GPU they take about a quarter of its memory, at 40 numbers of
    d_model per token; on a CPU a core's caches hold a good part of them."""
    if device.type != "cuda":
        return CPU_BATCH
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(1, min(65_536, memory // 4 // (80 * d_model)))


def rows_of(spec: StoreSpec, shards: Iterable[int]) -> int:
    return sum(stop - start for start, stop in map(spec.shard_range, shards))
