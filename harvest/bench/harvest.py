"""`sagsae bench harvest`: the cost of capture over a forward pass, and of the whole harvest over the slower of its two
halves.

Capture is the model with hooks that write into a shard's memory. On a CPU the moments are computed afterwards and are a
figure of their own; on a GPU they are part of capture. The bare forward pass is Hugging Face's own model, cut off after
the harvested layer, without TransformerLens and without hooks. Encoding is the codec alone, on every core, on the very
rows that are harvested.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from numpy.typing import NDArray

from harvest.background import pool
from harvest.capture import Capture, Slot, make_slot
from harvest.fill import SLOTS, default_batch_tokens, finish_work, stream_count
from harvest.ring import Ring
from harvest.run import harvest
from harvest.team import Team
from harvest.writer import Ready
from shared.bench.timing import machine
from shared.config import HarvestConfig
from shared.device import sent, torch_dtype
from shared.errors import UserError
from shared.model.hooks import layer_of
from shared.model.language_model import side_by_side
from shared.model.source import ModelSource, resolve_model
from shared.progress import hush
from shared.store.opened import Store
from shared.store.reader import open_reader, read_shard
from shared.store.shard import encode_chunk
from shared.store.spec import rows_that_count

BARE_BATCH: Final = 8_192
"""Tokens per batch that suit a forward pass on all cores of a CPU best. A harvest gives each core its own, smaller
batch."""


@dataclass(frozen=True)
class HarvestBenchReport:
    """Ratios of seconds: smaller is better, 1 is the limit."""

    ratios: dict[str, float | None]
    raw: dict[str, Any]


def bench_harvest(
    config: HarvestConfig, folder: Path, rounds: int, advance: Callable[[int, str], None]
) -> HarvestBenchReport:
    """Runs every measurement once per round, in turns, after one warm-up round; ratios are medians over the rounds.
    `config.tokens` must be given. Raises UserError for what a harvest would refuse."""
    if config.codec == "int8":
        raise UserError("--codec int8: encodes nothing. Measure zstd, lz4 or none")
    with hush():
        store = Store.open(
            harvest(config.model_copy(update={"out": str(folder), "name": "first", "reuse": "none"})).store
        )
    source = resolve_model(config.model, config.revision)
    device, cores = Team().device(config.device), Team().threads
    n_models = stream_count(device, store.spec, config, cores)
    models = side_by_side(source, device, store.spec.model["dtype"], config.attention, n_models)
    model = models[0]
    last = max(layer_of(hook.name) for hook in store.spec.hookpoints.values())
    bare = cut_off(source, model.device, store.spec.model["dtype"], last)
    tokens, spec = store.tokens(), store.spec
    contexts = max(1, (config.batch_tokens or default_batch_tokens(model.device, model.d_model)) // spec.context)
    alone = contexts if model.device.type == "cuda" else max(contexts, BARE_BATCH // spec.context)
    capture = Capture(models, spec, tokens, rows_that_count(tokens, spec), contexts, cores)
    ring: Ring[Slot] = Ring(lambda: make_slot(spec, model.device), SLOTS)
    chunks = encodable(store)

    def forward() -> None:
        bare_forward(bare, model.device, store, tokens, alone)

    def captured() -> None:
        counted.append(capture_shards(capture, store, ring))

    counted: list[float] = []

    def encoded() -> None:
        with ThreadPoolExecutor(cores) as encoders:
            list(encoders.map(lambda rows: encode_chunk(rows, spec.codec), chunks))

    seconds_by_part: dict[str, list[float]] = {"forward": [], "capture": [], "moments": [], "encode": [], "harvest": []}
    stalls = []
    for number in range(rounds + 1):
        seconds = {}
        for name, run in (("forward", forward), ("capture", captured), ("encode", encoded)):
            started = time.perf_counter()
            with enough_memory(model.device, contexts):
                run()
            seconds[name] = time.perf_counter() - started
            advance(1, name)
        seconds["moments"] = counted.pop()
        seconds["capture"] -= seconds["moments"]
        shutil.rmtree(folder / "again", ignore_errors=True)
        with hush():
            done = harvest(config.model_copy(update={"out": str(folder), "name": "again", "reuse": "none"}))
        seconds["harvest"] = done.seconds
        advance(1, "harvest")
        if number:
            stalls.append(done.waiting_for_writer)
            for name, value in seconds.items():
                seconds_by_part[name].append(value)
    return report(store, model.device, seconds_by_part, stalls)


@contextmanager
def enough_memory(device: torch.device, contexts: int) -> Iterator[None]:
    """Raises UserError when the device runs out of memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"--device {device}: its memory is too small for {contexts} contexts at once beside three copies of the "
            "model. Set fewer: --set batch_tokens=N"
        ) from error


def bare_forward(bare: Any, device: torch.device, store: Store, tokens: NDArray[Any], contexts: int) -> None:
    """Runs the bare model over every shard, `contexts` contexts at a time."""
    context = store.spec.context
    with torch.inference_mode():
        for shard in store.commits:
            start, stop = store.spec.shard_range(shard)
            end = -(-stop // context)
            for first in range(start // context, end, contexts):
                ids = torch.from_numpy(tokens[first : min(first + contexts, end)].astype("int64"))
                bare(sent(ids, device), use_cache=False)
    finish_work(device)


def capture_shards(capture: Capture, store: Store, ring: Ring[Slot]) -> float:
    """Captures all shards. On a GPU, as in a harvest, a shard is finished while the next one is computed. On a CPU the
    moments are computed after all shards are captured; returns the seconds that this takes."""
    waiting: list[Future[None]] = []
    later: list[Ready] = []

    def check_finished() -> None:
        for done in waiting:
            if done.done():
                done.result()

    def finish(ready: Ready, slot: Slot) -> None:
        ready()
        ring.give_back(slot)

    with pool(1, "capture") as behind:
        for shard in store.commits:
            slot = ring.take(check_finished)
            ready = capture.shard(shard, slot, lambda _: None)
            if capture.side is None:
                later.append(ready)
                ring.give_back(slot)  # taken again only after all batches of this shard are done
            else:
                waiting.append(behind.submit(finish, ready, slot))
        capture.finish(lambda _: None)
    for done in waiting:
        done.result()
    began = time.perf_counter()
    for ready in later:
        ready()
    return time.perf_counter() - began


def report(
    store: Store, device: torch.device, seconds_by_part: dict[str, list[float]], stalls: list[float]
) -> HarvestBenchReport:
    rounds = [dict(zip(seconds_by_part, values, strict=True)) for values in zip(*seconds_by_part.values(), strict=True)]
    stored = sum(store.stored_bytes(hook) for hook in store.spec.hookpoints)
    raw = sum(rows.nbytes for rows in encodable(store))
    ratios = {
        "capture_vs_forward": round(median(r["capture"] / r["forward"] for r in rounds), 3),
        "with_moments_vs_forward": round(median((r["capture"] + r["moments"]) / r["forward"] for r in rounds), 3),
        "harvest_vs_limit": round(median(r["harvest"] / max(r["forward"], r["encode"]) for r in rounds), 3),
        "stalled": round(median(stalls), 4),
    }
    figures = [
        {
            "what": name,
            "tokens/s": round(store.n_rows / median(seconds)) if any(seconds) else None,
            "GB/s": round(raw / median(seconds) / 1e9, 3) if any(seconds) else None,
            "seconds": round(median(seconds), 3),
            "lowest": round(min(seconds), 3),
            "highest": round(max(seconds), 3),
        }
        for name, seconds in seconds_by_part.items()
    ]
    about = {
        "machine": machine(),
        "device": device_name(device),
        "model": store.spec.model["name"],
        "dtype": store.spec.model["dtype"],
        "context": store.spec.context,
        "tokens": store.n_rows,
        "hookpoints": {path: hook.d_in for path, hook in store.spec.hookpoints.items()},
        "codec": store.spec.codec,
        "bytes": raw,
        "stored": stored,
    }
    return HarvestBenchReport(ratios, {**about, "figures": figures})


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def cut_off(source: ModelSource, device: torch.device, dtype: str, last: int) -> Any:
    """Hugging Face's model without its head and without the layers after `last`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        source.location, dtype=torch_dtype(dtype), attn_implementation="sdpa", **source.arguments
    )
    base = model.base_model.to(device).eval().requires_grad_(False)
    n = model.config.get_text_config().num_hidden_layers
    blocks = next(m for m in base.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == n)
    del blocks[last + 1 :]
    return base


def encodable(store: Store) -> list[NDArray[Any]]:
    """All rows of all hookpoints in the chunks in which they are stored."""
    chunks = []
    for hook in store.spec.hookpoints:
        for shard in store.commits:
            rows = read_shard(open_reader(store, hook), shard)
            chunks += [rows[at : at + store.spec.chunk_rows] for at in range(0, len(rows), store.spec.chunk_rows)]
    return chunks
