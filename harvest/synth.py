"""synth(config): writes a store of synthetic activations whose true features are known (shared/synthetic.py).

Writer, moments and commits are those of a harvest; only the rows come from a generator instead of a language model. The
same call resumes an interrupted one: every row can be made without the others, so it writes the missing shards.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from harvest import background
from harvest.begin import make_folder, remove_empty_folder
from harvest.disk_space import (
    INDEX_BYTES,
    DiskNeed,
    check_fits,
    free_bytes,
    free_text,
    stored_size,
    usual_ratio,
)
from harvest.moments import MomentsPart, moments_on_host
from harvest.reuse.shape import default_chunk_rows
from harvest.writer import ShardRows, ShardWriter
from shared.config import SynthConfig
from shared.device import torch_dtype, usable_cores
from shared.errors import Interrupted, UserError
from shared.files.base import Files, join
from shared.files.local import LocalFiles
from shared.files.locks import check_alone
from shared.files.open import open_files
from shared.progress import gigabytes, progress, say
from shared.record import provenance
from shared.schema import build
from shared.stop import stop_requests
from shared.store.create import (
    building,
    check_replaceable,
    clean_up,
    create_store,
    delete_old_store,
    finish_store,
    place_tokens,
    reopen_store,
    write_tokens,
)
from shared.store.opened import Store, is_store
from shared.store.spec import DTYPES, HookSpec, StoreSpec
from shared.store.tokens import CountedMask, TokenMask
from shared.synthetic import BLOCK, NAME, Synthetic, TrueFeatures

HOOK: Final = f"layer_00/{NAME}"
AGAIN: Final = "run the same command again"
SHARDS: Final = 16
MOST_CHUNKS: Final = 128
ROWS_AT_A_TIME: Final = 1 << 20
"""Token ids written at a time."""


@dataclass(frozen=True)
class SynthSummary:
    """The result of `synth`."""

    store: str
    tokens: int
    hookpoints: dict[str, dict[str, Any]]
    seconds: float
    tokens_per_second: float


def synth(config: SynthConfig) -> SynthSummary:
    """Writes until the store is complete. Raises UserError for unusable input, Interrupted after a signal."""
    try:
        return write_store(config)
    except (UserError, Interrupted) as error:
        if config.overwrite and AGAIN in str(error):  # the same command would overwrite the store once more
            raise type(error)(str(error).replace(AGAIN, f"{AGAIN} without --overwrite")) from error
        raise


def write_store(config: SynthConfig) -> SynthSummary:
    """Writes the store, or the part of it that is missing."""
    files, spec = open_files(join(config.out, config.name)), spec_of(config)
    if not config.overwrite and is_store(files):
        store = Store.open(files)
        check_same(store, spec)
        if store.state == "final" and not store.missing:
            say(f"{files.name} is complete: {store.n_rows:,} tokens. Nothing to do (--overwrite starts again).")
            return summarise(store, 0.0, 0)
    check_space(config, files)
    make_folder(files, config.overwrite)
    started = time.monotonic()
    with files.explained(), files.lock(), stop_requests() as stop_asked:
        if isinstance(files, LocalFiles):
            check_alone(files.root)
        if config.overwrite or not is_store(files):
            begin_store(files, spec, config)
        clean_up(files)
        store = Store.open(files)
        check_same(store, spec)  # again: another process may have been here meanwhile
        reopen_store(store)
        written = make_shards(store, TrueFeatures(parameters_of(config)), stop_asked)
        finish_store(files, spec)
    return summarise(Store.open(files), time.monotonic() - started, written)


def parameters_of(config: SynthConfig) -> Synthetic:
    return Synthetic.model_validate(config.model_dump(include=set(Synthetic.model_fields)))


def spec_of(config: SynthConfig) -> StoreSpec:
    """The spec of the store. All of it follows from the configuration: the token ids are zeros."""
    parameters = parameters_of(config).model_dump(mode="json")
    digest = hashlib.blake2b(json.dumps(parameters, sort_keys=True).encode(), digest_size=16).hexdigest()
    ids = hashlib.blake2b(digest_size=16)
    for block in token_blocks(config):
        ids.update(block.tobytes())
    chunk_rows, shard_rows = shape_of(config)
    return build(
        StoreSpec,
        {
            "model": {
                "name": NAME,
                "commit": digest,
                "local": True,
                "dtype": "float64",
                "attention": "none",
                "weight_processing": "none",
                NAME: parameters,
            },
            "tokenizer": {"blake2b": None, "eos_id": None},
            "corpus": {"source": NAME, "whole": True, "vocab_size": 1, "documents": 0, "ids_blake2b": ids.hexdigest()},
            "context": config.context,
            "bos_id": None,
            "special_ids": (),
            "skip_positions": 0,
            "n_tokens": config.tokens,
            "token_dtype": "uint16",
            "hookpoints": {HOOK: HookSpec(name=NAME, d_in=config.d_in)},
            "dtype": config.store_dtype,
            "codec": config.codec,
            "chunk_rows": chunk_rows,
            "shard_rows": shard_rows,
            "seed": config.seed,
        },
    )


def shape_of(config: SynthConfig) -> tuple[int, int]:
    """Rows per chunk and per shard: as configured, else chunks of 2 MiB and about 16 shards, of at most 128 chunks.
    Raises UserError when the two do not fit together."""
    chunk_rows = config.chunk_rows or default_chunk_rows(config.d_in * DTYPES[config.store_dtype][0].itemsize)
    chunks = min(MOST_CHUNKS, -(-config.tokens // (chunk_rows * SHARDS)))
    shard_rows = config.shard_rows or chunk_rows * chunks
    if shard_rows % chunk_rows:
        raise UserError(f"shard_rows: {shard_rows} is not a multiple of chunk_rows = {chunk_rows}")
    return chunk_rows, shard_rows


def token_blocks(config: SynthConfig) -> Iterator[NDArray[np.uint16]]:
    """Rows of token ids, [n, context]."""
    left = -(-config.tokens // config.context)
    while left:
        n = min(left, max(1, ROWS_AT_A_TIME // config.context))
        yield np.zeros((n, config.context), "<u2")
        left -= n


def check_same(store: Store, spec: StoreSpec) -> None:
    """Raises UserError, naming every field that differs, when the store is another."""
    here, asked = (requested_values(s.model_dump(mode="json")) for s in (store.spec, spec))
    keys = [key for key in {**here, **asked} if here.get(key) != asked.get(key)]
    if keys:
        differ = "; ".join(f"{key}: the store has {here.get(key)}, this asks for {asked.get(key)}" for key in keys)
        raise UserError(
            f"{store.name}: holds another store. {differ}. Choose another --name or --out, or start again with "
            "--overwrite"
        )


def requested_values(spec: dict[str, Any]) -> dict[str, Any]:
    """The values that you can have asked for, by name: the parameters, not the digests that follow from them."""
    model = spec["model"]
    parameters = model.get(NAME, {})
    rest = {key: value for key, value in spec.items() if key not in ("model", "tokenizer", "corpus", "hookpoints")}
    source = {} if parameters else {"hookpoints": list(spec["hookpoints"])}
    return {"model": model.get("name"), **parameters, **source, **rest}


def check_space(config: SynthConfig, files: Files) -> None:
    """Prints what will be written, and raises BusyError when too little disk space is free."""
    raw = config.d_in * DTYPES[config.store_dtype][0].itemsize
    size = int(config.tokens * (raw / usual_ratio(config.codec, config.store_dtype) + 4))
    stored, free = stored_size(files), free_bytes(files)
    if config.overwrite and free is not None:  # the old store is deleted first
        free, stored = free + stored, 0
    need = DiskNeed({HOOK: size}, config.tokens * INDEX_BYTES, stored, free)
    size_text = f"about {gigabytes(need.to_write)}{free_text(need)}"
    say(f"{files.name}: {config.tokens:,} tokens of width {config.d_in}, {size_text}")
    check_fits(config.out, need)


def begin_store(files: Files, spec: StoreSpec, config: SynthConfig) -> None:
    """Writes the token rows, then the empty store. The old content is removed only when the tokens are written."""
    check_replaceable(files)
    with building(files) as folder:
        try:
            tokens = write_tokens(folder, token_blocks(config), config.context, 1)
        except BaseException:
            remove_empty_folder(files)
            raise
        delete_old_store(files, folder.name)
        place_tokens(files, tokens)
    create_store(files, spec, tokens.files, {**provenance(), "config": config.model_dump(mode="json")})


def make_shards(store: Store, truth: TrueFeatures, stop_asked: Callable[[], bool]) -> int:
    """Makes and commits the missing shards; a shard is made while the previous one is written. Returns the number of
    rows."""
    spec, todo = store.spec, store.missing
    keep = CountedMask(store.token_rows())
    rows = sum(stop - start for start, stop in map(spec.shard_range, todo))
    threads = usable_cores()
    _ = truth.directions, truth.scale, truth.limits  # computed once, before threads share them
    with (
        background.pool(threads, "synth") as pool,
        closing(ShardWriter(store.files, spec, keep)) as writer,
        progress(f"synth {store.name}", rows, "tokens") as advance,
    ):

        def after_block(made: int) -> None:
            advance(made, "")
            writer.check()
            if stop_asked():
                raise Interrupted(f"{store.name}: stopped. To continue, {AGAIN}")

        for shard in todo:
            made = shard_rows(spec, truth, keep, shard, pool, after_block)
            writer.wait()
            writer.submit(shard, partial(dict, {HOOK: made}))
        writer.wait()
    return rows


def shard_rows(
    spec: StoreSpec,
    truth: TrueFeatures,
    keep: TokenMask,
    shard: int,
    pool: Executor,
    after_block: Callable[[int], None],
) -> ShardRows:
    """One shard's rows [n, d_in] as they are stored, in the order of the token stream, and their moments. `after_block`
    is called with the number of rows of each block and may raise to stop."""
    start, stop = spec.shard_range(shard)
    found = torch.empty(stop - start, truth.parameters.d_in, dtype=torch_dtype(spec.dtype))

    def make(block: int) -> int:
        first, last = max(start, block * BLOCK), min(stop, (block + 1) * BLOCK)
        x = truth.block_rows(block)[first - block * BLOCK : last - block * BLOCK]
        found[first - start : last - start] = torch.from_numpy(x)
        return last - first

    for made in pool.map(make, range(start // BLOCK, -(-stop // BLOCK))):
        after_block(made)
    rows = (found.view(torch.uint16) if spec.dtype == "bfloat16" else found).numpy()
    norms = np.empty(len(rows), np.float32)
    ((total, squares),) = moments_on_host(pool, [MomentsPart(rows, keep[start:stop], norms)])
    return ShardRows(rows, norms, total, squares)


def summarise(store: Store, seconds: float, rows: int) -> SynthSummary:
    stored = store.stored_bytes(HOOK)
    d_in = store.spec.hookpoints[HOOK].d_in
    raw = store.n_rows * d_in * DTYPES[store.spec.dtype][0].itemsize
    about = {"d_in": d_in, "bytes": stored, "ratio": round(raw / max(1, stored), 3)}
    rate = rows / seconds if seconds else 0.0
    return SynthSummary(store.name, store.n_rows, {HOOK: about}, round(seconds, 2), round(rate, 1))
