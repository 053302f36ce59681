"""`sagsae harvest --dry-run`: sends one batch through the model and the codec, and estimates the whole harvest.

Nothing is written. The batch is the beginning of the corpus, unshuffled, so that little of it has to be read.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harvest.capture import BITS
from harvest.corpus.pack import PackCounts
from harvest.corpus.tokenise import token_rows
from harvest.disk_space import estimate, raw_bytes
from harvest.fill import default_batch_tokens, forget_batch, no_memory
from harvest.plan import HarvestPlan, check_same, make_plan
from harvest.reuse.shape import default_chunk_rows
from harvest.team import Team
from shared.config import HarvestConfig
from shared.device import torch_dtype
from shared.errors import UserError
from shared.model.language_model import LanguageModel
from shared.progress import say
from shared.store.opened import Store, is_store
from shared.store.quantise import dim_scale, quantise
from shared.store.shard import as_float32, encode_chunk

ROUNDS = 3


@dataclass(frozen=True)
class DryRunResult:
    """The estimate that one batch yields for the whole harvest."""

    store: str
    tokens: int | None
    """Tokens of the harvest; None: all of the corpus, whose size is only known after reading it."""
    hookpoints: dict[str, dict[str, Any]]
    """By hookpoint path: d_in, the measured ratio, and bytes (per million tokens where `tokens` is None)."""
    bytes_to_write: int
    bytes_free: int | None
    fits: bool | None
    """Whether the store fits on the disk; None where `tokens` is None."""
    model_tokens_per_second: float
    codec_tokens_per_second: float
    """Encoding speed on all cores of this machine."""
    tokens_per_second: float
    """Speed of the whole harvest. On a GPU it is the slower of the two; on a CPU both share the cores."""
    seconds: float | None
    """Seconds for the rows that are not committed yet; None where `tokens` is None."""


def trial(config: HarvestConfig, processes: int = 1) -> DryRunResult:
    """Measures one batch of a harvest with `processes` processes. Raises UserError when the configuration is wrong, or
    when a store exists that was made differently."""
    plan = make_plan(config)
    left = rows_left(plan)
    say(f"{plan.name}: a dry run on one batch")
    model = LanguageModel(plan.source, plan.device, plan.dtype, config.attention)
    batch = config.batch_tokens or default_batch_tokens(model.device, model.d_model)
    rows, model_seconds = capture_batch(plan, model, first_rows(plan, max(1, batch // plan.context)))
    n = len(next(iter(rows.values())))
    threads = Team().threads
    sizes, codec_seconds = encode_rows(config, rows, threads)
    ratios = {path: n * raw_bytes(config, plan.hooks[path].d_in) / size for path, size in sizes.items()}
    need = estimate(plan, config.tokens or 1_000_000, ratios)
    if config.tokens is None:
        need = replace(need, stored=0)
    shared = model_seconds + codec_seconds
    together = shared if model.device.type == "cpu" else max(model_seconds / processes, codec_seconds)
    return DryRunResult(
        plan.name,
        config.tokens,
        {
            path: {"d_in": hook.d_in, "ratio": round(ratios[path], 3), "bytes": need.hookpoints[path]}
            for path, hook in plan.hooks.items()
        },
        need.to_write,
        need.free,
        need.fits if config.tokens else None,
        round(n / model_seconds, 1),
        round(n / codec_seconds, 1),
        round(n / together, 1),
        round(left * together / n, 3) if left is not None else None,
    )


def rows_left(plan: HarvestPlan) -> int | None:
    """Rows that the harvest would still write; None where only reading the corpus would tell."""
    if plan.config.overwrite or not is_store(plan.files):
        return plan.config.tokens
    store = Store.open(plan.files)
    check_same(plan, store.spec)
    return store.spec.n_tokens - store.n_rows


def first_rows(plan: HarvestPlan, contexts: int) -> NDArray[Any]:
    """[contexts, context] token ids from the beginning of the corpus. Raises UserError when it has less than one
    row."""
    config = plan.config.model_copy(update={"shuffle_documents": False, "tokens": None})
    blocks: Iterator[NDArray[Any]] = token_rows(replace(plan, config=config), PackCounts(), lambda: None)
    found = list(islice(chain.from_iterable(blocks), contexts))
    if not found:
        raise UserError(f"the corpus has less than one row of {plan.context}. Lower --context, or give more text")
    return np.stack(found)


def capture_batch(plan: HarvestPlan, model: LanguageModel, ids: NDArray[Any]) -> tuple[dict[str, NDArray[Any]], float]:
    """Rows of every hookpoint as they are stored, on the host, and the median seconds per batch."""
    found: dict[str, torch.Tensor] = {}
    dtype = torch_dtype(plan.config.store_dtype)

    def sink(path: str, activations: torch.Tensor) -> None:
        found[path] = activations.to(dtype).to("cpu", copy=True)

    sinks = {hook.name: lambda x, path=path: sink(path, x) for path, hook in plan.hooks.items()}
    while True:
        try:
            seconds = seconds_of_a_batch(model, sinks, ids)
            break
        except torch.OutOfMemoryError as error:
            if len(ids) == 1:
                raise no_memory(model.device, plan.context) from error
        ids = ids[: len(ids) // 2]
        found.clear()
        forget_batch(model.device)  # outside `except`: the error kept the batch's memory alive
    return {path: x.view(BITS.get(x.dtype, x.dtype)).numpy() for path, x in found.items()}, seconds


def seconds_of_a_batch(model: LanguageModel, sinks: Mapping[str, Callable[[Tensor], None]], ids: NDArray[Any]) -> float:
    """The median seconds of `ROUNDS` runs of one batch."""
    seconds = []
    with model.capturing(sinks) as run:
        for _ in range(ROUNDS):
            started = time.perf_counter()
            run(torch.from_numpy(ids.astype("int64")))
            seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


def encode_rows(config: HarvestConfig, rows: dict[str, NDArray[Any]], threads: int) -> tuple[dict[str, int], float]:
    """Encoded bytes of every hookpoint's rows, and the seconds that encoding takes on `threads` threads."""
    sizes: dict[str, int] = {}
    at = config.chunk_rows or default_chunk_rows(max(x.shape[1] * x.itemsize for x in rows.values()))
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for path, x in rows.items():
            chunks = [x[i : i + at] for i in range(0, len(x), at)]
            sizes[path] = sum(pool.map(lambda chunk: encoded_size(config, chunk), chunks))
    return sizes, time.perf_counter() - started


def encoded_size(config: HarvestConfig, rows: NDArray[Any]) -> int:
    if config.codec != "int8":
        return len(encode_chunk(rows, config.codec))
    x = as_float32(rows, config.store_dtype)
    q, scale = quantise(x, dim_scale(np.square(x.astype(np.float64)).sum(0), len(x)))
    return q.nbytes + scale.nbytes
