"""The loop of a harvest: a shard is captured while the one before is written."""

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
"""Shards in memory: one that is captured, one that is written, one that waits in between."""
CPU_BATCH = 2_048
"""Tokens."""
MOST_STREAMS = 16
"""Each is a wrapper around the model, which takes a moment to make; more cores than that share the batches."""


@dataclass(frozen=True)
class FillResult:
    """How it went."""

    started: float
    """When the model was loaded and the first batch began, by the monotonic clock."""
    waited: float
    """Seconds in which the model waited for the writer."""


def fill(
    store: Store,
    config: HarvestConfig,
    source: ModelSource,
    team: Team,
    look: Callable[[], None],
    todo: list[int],
    loaded: Any = None,
) -> FillResult:
    """Captures and commits these shards. `look` is called between batches and may raise. `loaded`: what `load_weights`
    gave, if it is there already."""
    spec = store.spec
    look()
    device = team.device(config.device)
    beside = streams(device, spec, config, team.threads)
    models = side_by_side(source, device, spec.model["dtype"], spec.model["attention"], beside, loaded)
    model = models[0]
    look()
    model.check_hooks([hook.name for hook in spec.hookpoints.values()])
    tokens = store.token_rows(check=team.rank == 0)  # the others read those of their own shards
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
        watch = HarvestWatch(store, config, team, writer, ring, look, advance)
        for shard in todo:
            slot = ring.take(watch.check)
            rows = capture_shard(capture, shard, slot, watch)
            writer.submit(shard, rows, partial(ring.give_back, slot))
        capture.finish(watch.after_batch)
        writer.wait()
    return FillResult(watch.started, ring.waited)


def streams(device: str, spec: StoreSpec, config: HarvestConfig, cores: int) -> int:
    """Batches that are computed side by side. On a CPU one a core, or as many as fit into a quarter of the memory that
    is free, at some 40 numbers of a row's width a token."""
    if not device.startswith("cpu"):
        return 1
    tokens = max(spec.context, config.batch_tokens or CPU_BATCH)
    each, free = 160 * tokens * max(hook.d_in for hook in spec.hookpoints.values()), host_memory()
    return max(1, min(cores, MOST_STREAMS, cores if free is None else free // 4 // each))


def finish_work(device: torch.device) -> None:
    """Waits until the model has computed what it was asked to."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def capture_shard(capture: Capture, shard: int, slot: Slot, watch: "HarvestWatch") -> Ready:
    """In smaller batches from here on when a GPU's memory does not suffice. Raises UserError when it does not suffice
    for one context."""
    while True:
        before = watch.rows
        try:
            return capture.shard(shard, slot, watch.after_batch)
        except torch.OutOfMemoryError as error:
            watch.after_batch(before - watch.rows)
            if capture.batch == 1:
                raise no_memory(capture.model.device, capture.spec.context) from error
        capture.batch = -(-capture.batch // 2)
        say(f"out of memory: going on with {capture.batch * capture.spec.context:,} tokens in a batch")
        forget_batch(capture.model.device)


def forget_batch(device: torch.device) -> None:
    """After one for which memory did not suffice: nothing of it is in use any more, and its memory is free."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def no_memory(device: torch.device, context: int) -> UserError:
    return UserError(
        f"--device {device}: its memory does not suffice for one context of {context} tokens. Lower --context, or use "
        "a larger GPU"
    )


class HarvestWatch:
    """Looks after a harvest between batches: stops, failed commits, progress, room on the disk."""

    def __init__(
        self,
        store: Store,
        config: HarvestConfig,
        team: Team,
        writer: ShardWriter,
        ring: Ring[Slot],
        look: Callable[[], None],
        advance: Callable[[int, str], None],
    ) -> None:
        self.store, self.config, self.team, self.writer, self.ring = store, config, team, writer, ring
        self.look, self.advance = look, advance
        spec = store.spec
        self.row_bytes = sum(hook.d_in for hook in spec.hookpoints.values()) * DTYPES[spec.dtype][0].itemsize
        self.started = time.monotonic()
        self.rows = 0
        self.measured = False

    def check(self) -> None:
        """Raises what stops a harvest: a signal, a commit that failed, a disk that turns out too small."""
        self.look()
        self.writer.check()
        if self.writer.commits and not self.measured:
            self.measured = True
            said = check_progress(self.store, self.writer.commits, self.config.out)
            if self.team.rank == 0:
                say(f"measured on the first shard: {said}")

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
    """On a GPU what takes about a quarter of its memory, by 40 numbers of d_model a token; on a CPU what a core's
    caches hold a fair part of."""
    if device.type != "cuda":
        return CPU_BATCH
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(1, min(65_536, memory // 4 // (80 * d_model)))


def rows_of(spec: StoreSpec, shards: Iterable[int]) -> int:
    return sum(stop - start for start, stop in map(spec.shard_range, shards))
